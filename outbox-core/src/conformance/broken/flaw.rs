//! The flaws of stores, and how a list of flaws is written.

macro_rules! flaws {
    ($(#[$meta:meta])* $name:ident { $($(#[doc = $doc:literal])+ $flaw:ident,)* }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum $name { $($(#[doc = $doc])+ $flaw,)* }

        impl $name {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$flaw),*];
        }
    };
}
pub(super) use flaws;

flaws! {
    /// What is wrong with a [`BrokenStore`](super::BrokenStore).
    ///
    /// ```
    /// use outbox_core::conformance::broken::StoreFlaw;
    ///
    /// assert!(StoreFlaw::ALL.contains(&StoreFlaw::PositionCursor));
    /// ```
    StoreFlaw {
        /// Reads what has a higher position than what was read last; late commits are lost.
        PositionCursor,
        /// The same, with a cursor that goes on to the highest position that is visible after the read.
        CursorToMaximum,
        /// Puts a batch together from two reads.
        TwoSnapshots,
        /// Keeps what it returned out for ever, though the shard was lost and regained.
        CursorSurvivesLoss,
        /// Returns nothing twice under one epoch, though it is wanted again.
        RereadIgnored,
        /// Does not go back for what was held when it passed by, unless it is told to.
        PassedOverForgotten,
        /// Claims rows and skips those that are claimed, without an order, as `SKIP LOCKED` does.
        RowClaims,
        /// Does not heed holds: what follows a failed message passes it.
        HoldIgnored,
        /// Leaves keyless messages out as soon as a key is held: `NULL NOT IN (…)` is not true.
        KeylessNull,
        /// Holds a key in all topics.
        HoldForgetsTopic,
        /// Returns what is in flight.
        InFlightReturned,
        /// Returns records of shards that were not asked for.
        OtherShards,
        /// Takes no notice of the limit in bytes.
        BytesIgnored,
        /// Lets no record pass that is larger than the limit: it stays for ever.
        LargeRecordStuck,
        /// Reads the newest keys first.
        NewestFirst,
        /// Says that nothing is eligible when it has just returned a full batch.
        EmptyTooEarly,
        /// Settles by deleting all that is visible.
        NaiveMark,
        /// Settles whatever the epoch is.
        NoFencing,
        /// Looks at the epoch, then settles: a take-over fits in between.
        EpochOnlyRead,
        /// Looks at the epoch, but not at the owner.
        OwnerIgnored,
        /// Refuses a whole settlement for one shard that was lost.
        AllShardsOrNothing,
        /// Refuses a settlement of what is settled already.
        RepeatRefused,
        /// Settles by position alone.
        PositionOnly,
        /// Settles by id alone.
        IdOnly,
        /// Leases by the clock of the relay's machine, which differ.
        ApplicationClock,
        /// A lease never ends.
        LeaseNeverExpires,
        /// An owner that takes its own shard again keeps the epoch.
        EpochStays,
        /// Frees shards whatever the epoch is, and whoever asks.
        ReleaseUnchecked,
        /// Takes one shard even for a relay that wants none.
        WantIgnored,
        /// Gives shards up by itself when fewer are wanted.
        LeaseShrinks,
        /// Keeps holds in the process only.
        HoldsForgotten,
        /// Adds attempts up.
        AttemptsAddUp,
        /// One hold a shard for all keyless messages.
        KeylessHoldsShared,
        /// Enqueues outside of the producer's transaction.
        VisibleBeforeCommit,
        /// Keeps what was rolled back.
        KeptOnRollback,
        /// Writes the messages before the one that it refuses.
        RefusedHalfWay,
        /// After the last attempt a message is neither in the outbox nor in the dead letters.
        Stranded,
        /// Takes deaths and says that it keeps no dead letters.
        SilentDeaths,
        /// Names dead letters by their id alone.
        DeadById,
        /// Requeues in two steps.
        RequeueInTwoSteps,
        /// Requeues without headers.
        RequeueLosesHeaders,
        /// Makes text of bytes.
        LossyUtf8,
        /// Keeps one value a header name, in the order of names.
        HeadersAsMap,
        /// Keeps empty values as NULL.
        EmptyIsNull,
        /// Drops a message whose id it has seen.
        IdsUnique,
        /// Trusts the producer's time.
        ProducerClock,
        /// Takes scheduled messages and delivers them at once.
        DeliverAtIgnored,
        /// Promotes for whoever asks.
        PromotionUnfenced,
        /// Purges the archive whatever its age.
        PurgesEverything,
        /// Numbers a key outside of the producer's transaction: a rollback leaves a gap.
        GapOnRollback,
        /// Gives the position for the number within the key.
        PositionIsNumber,
        /// Numbers everything.
        NumbersEverything,
        /// Gives what is requeued its old number.
        NumberKept,
        /// Loses messages that have no key.
        KeylessLost,
        /// Takes what is not to go yet, and never promotes it.
        ScheduledForgotten,
        /// Takes one shard more than is wanted.
        TakesTooMany,
        /// Tells the relay that it is alone.
        MembersUncounted,
        /// Tells that a lease runs for longer than it does.
        TimeLeftWrong,
        /// Refuses a settlement of nothing.
        NothingRefused,
        /// Cuts long keys.
        LongKeyCut,
        /// Drops content types.
        ContentTypeLost,
        /// Says that it keeps no headers, and drops them.
        HeadersDropped,
        /// Keeps what is due already for later.
        PastWaits,
        /// Resumes whatever it is asked to.
        ResumesAnything,
        /// Has an archive that nobody can purge.
        ArchiveUnpurged,
        /// Archives nothing.
        ArchiveEmpty,
        /// Has a power in some handles only.
        PowersFlicker,
        /// Tells that nothing is old.
        AgeUnknown,
        /// Lists dead letters whatever their ids.
        DeadIdsIgnored,
        /// Looks for a message in the outbox alone.
        InspectsOutboxOnly,
        /// Tells one place of a message and stops looking.
        InspectsFirstPlace,
        /// Looks for a key in all topics.
        InspectsKeyOfAnyTopic,
        /// Tells the newest message of a topic for its first.
        InspectsTopicFromItsEnd,
        /// Tells that nobody stands before a message.
        InspectsNoLine,
        /// Tells the hold of a message or a key and forgets its topic's.
        InspectsNoTopicHold,
        /// Tells that nobody owns a shard.
        InspectsNoOwner,
        /// Tells the last number that is still in the outbox for the last that was given.
        InspectsNumbersLeft,
        /// Says that what it has not seen is not there.
        InspectsTooSurely,
    }
}
