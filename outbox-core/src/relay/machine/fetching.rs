//! When to read, what to ask for, and what to take of the answer.

use std::sync::Arc;
use std::time::Duration;

use super::{Command, Flight, Machine, Note, Queue, SERIAL_WAITING, Stage};
use crate::error::Result;
use crate::fetch::{FetchRequest, Fetched, Held, Record, Reread, RereadScope};
use crate::scheduled::Promotion;
use crate::shard::{OwnedShard, Position, Shard};

#[derive(Debug, Default)]
pub(super) struct Fetching {
    /// The request that is out, with what must still be true when its answer comes.
    asked: Option<Asked>,
    /// How many requests there have been.
    pub(super) count: u64,
    next: Duration,
    /// The present pause between reads that find nothing.
    idle: Duration,
    /// Woken or not, it does not read again before.
    rest: Duration,
    woken: bool,
    /// Whether the last answer was empty, whole and accepted.
    nothing: bool,
    failures: u32,
    /// The shards whose messages are being promoted.
    promoting: Option<Vec<OwnedShard>>,
    /// Those of which nothing was due when it was last asked.
    promoted: Vec<OwnedShard>,
    promote_next: Duration,
    promote_failures: u32,
}

#[derive(Debug)]
pub(super) struct Asked {
    at: Duration,
    pub(super) shards: Vec<OwnedShard>,
    /// What was left out.
    pub(super) held: Arc<Held>,
    /// See [`super::publishing::Publishing::generation`].
    generation: u64,
}

#[cfg(test)]
impl Asked {
    /// What was asked of these shards, with so much left out.
    pub(super) const fn of(shards: Vec<OwnedShard>, held: Arc<Held>) -> Self {
        Self {
            at: Duration::ZERO,
            shards,
            held,
            generation: 0,
        }
    }
}

/// How long scheduled messages may be late because nobody looked.
const PROMOTE_EVERY: Duration = Duration::from_secs(1);

/// How many times `poll_busy` the pause is at most that gathers messages.
const GATHERS: u32 = 5;

impl Fetching {
    /// Reads as soon as it may: what an answer brings that is out may be older than the wake-up.
    pub(super) fn wake(&mut self) {
        self.woken = true;
    }

    pub(super) fn found_nothing(&self) -> bool {
        self.nothing && self.asked.is_none() && !self.woken
    }
}

impl Machine {
    pub(super) fn poll_fetch(&mut self, now: Duration) -> Option<Command> {
        if self.fetch_due()? > now {
            return None;
        }
        let shards = self.leasing.active();
        self.fetching.count += 1;
        let mut reread = self.release_due_holds(now);
        for owned in &shards {
            if let Some(from) = self
                .leasing
                .owned
                .get_mut(&owned.shard)
                .and_then(|owned| owned.reread.take())
            {
                reread.push(Reread {
                    shard: owned.shard,
                    scope: RereadScope::Shard,
                    from,
                });
            }
        }
        self.fetching.woken = false;
        self.fetching.nothing = false;
        self.fetching.asked = Some(Asked {
            at: now,
            shards: shards.clone(),
            held: self.holds.held(),
            generation: self.publishing.generation,
        });
        let config = &self.setup.config;
        Some(Command::Fetch {
            request: Arc::new(FetchRequest {
                shards,
                in_flight: self.flights.keys().copied().collect(),
                held: self.holds.held(),
                reread,
                max_rows: config.batch_rows.min(config.window_rows - self.flights.len()),
                max_bytes: config.batch_bytes,
            }),
        })
    }

    fn may_fetch(&self) -> bool {
        let config = &self.setup.config;
        self.fetching.asked.is_none()
            && !self.stopping
            && self.publishing.is_open()
            && self.flights.len() < config.window_rows
            && self.bytes < config.window_bytes
            // A full window frees up row by row; reading by handfuls would cost a round trip each.
            && (config.window_rows - self.flights.len() >= config.batch_rows.min(config.window_rows / 2).max(1))
    }

    pub(super) fn fetch_due(&self) -> Option<Duration> {
        if !self.may_fetch() || !self.reads() {
            return None;
        }
        if self.fetching.failures > 0 {
            // However much there is to do: a store that fails is not to be pestered.
            return Some(self.fetching.next);
        }
        if self.fetching.woken {
            return Some(self.fetching.rest);
        }
        let due = self.holds.due();
        Some(due.map_or(self.fetching.next, |due| due.min(self.fetching.next)))
    }

    /// When to look again whether a hold can be released: its turn has come, and it cannot yet.
    pub(super) fn look_again(&self, now: Duration) -> Duration {
        now + self.fetching.idle.max(self.setup.config.poll_busy)
    }

    pub(super) fn fetched(&mut self, result: Result<Fetched>, now: Duration) {
        let Some(asked) = self.fetching.asked.take() else {
            return;
        };
        let (records, more) = match result {
            Ok(Fetched::Batch { records, more }) => (records, more),
            Ok(Fetched::Reset { reason }) => {
                self.note(Note::Reset { reason });
                self.fetch_failed(now);
                self.reset(now);
                return;
            }
            Err(error) => {
                // The next reader starts from nothing and so finds again what this one was asked to reread.
                let pause = self.fetch_failed(now);
                self.store_failed("fetch", error, pause);
                return;
            }
        };
        self.fetching.failures = 0;
        let rows = records.len();
        let current =
            asked.generation == self.publishing.generation && self.publishing.is_open() && !self.stopping;
        for record in records {
            // They are in order, and records are many.
            let owned = asked
                .shards
                .binary_search_by_key(&record.shard, |owned| owned.shard);
            if !owned.is_ok_and(|at| self.leasing.owns(record.shard, asked.shards[at].epoch)) {
                continue;
            }
            if current {
                self.take(record);
            } else {
                self.reread(record.shard, record.position);
            }
        }
        if rows == 0 && !more && current {
            self.fetching.nothing = true;
            self.drop_vanished_holds(&asked);
        }
        self.pace(rows, more, now.saturating_sub(asked.at), now);
    }

    fn fetch_failed(&mut self, now: Duration) -> Duration {
        self.fetching.failures = self.fetching.failures.saturating_add(1);
        let pause = self
            .setup
            .config
            .outage_retry
            .pause(self.fetching.failures, &mut self.random);
        self.fetching.next = now + pause;
        pause
    }

    /// Reads again at once while there is more, and ever more rarely while there is nothing. In between messages come one
    /// by one: a pause gathers some, because a read costs about as much for one as for a hundred. It grows with what came,
    /// and lasts at least as long as the read `took`: the more there is to do, the fewer and larger the batches are.
    fn pace(&mut self, rows: usize, more: bool, took: Duration, now: Duration) {
        let config = &self.setup.config;
        let rest = if more {
            Duration::ZERO
        } else {
            let gathers = u32::try_from(rows / 2).map_or(GATHERS, |half| half.clamp(1, GATHERS));
            took.max(config.poll_busy * gathers).min(config.poll_idle)
        };
        let pause = if rows == 0 && !more {
            (self.fetching.idle * 2).clamp(rest, config.poll_idle)
        } else {
            rest
        };
        self.fetching.idle = if rows == 0 { pause } else { Duration::ZERO };
        self.fetching.rest = now + rest;
        self.fetching.next = now + pause;
    }

    /// Takes a record in, unless its way is closed by now.
    fn take(&mut self, mut record: Record) {
        let (shard, position) = (record.shard, record.position);
        let key = record.message.order_key();
        let topic = match &key {
            Some(key) => key.topic.clone(),
            None => Arc::from(record.message.topic()),
        };
        if self.flights.contains_key(&(shard, position)) {
            self.note(Note::ContractBroken {
                who: "reader",
                what: "returned a record that is in flight",
            });
            return;
        }
        if self
            .leasing
            .owned
            .get(&shard)
            .is_none_or(|owned| !owned.is_active())
        {
            self.reread(shard, position);
            return;
        }
        if !self.holds.admit_topic(&topic) {
            // Opening the topic rereads everything.
            return;
        }
        if self.holds.keep_out(shard, position, key.as_ref()) {
            return;
        }
        // Only of keys that go one by one does anybody keep count.
        let queue = key
            .as_ref()
            .filter(|_| self.is_serial())
            .map(|key| (shard, key.clone()));
        let ahead = queue
            .as_ref()
            .and_then(|key| self.queues.get(key))
            .map_or(0, |queue| queue.unresolved);
        if let Some((shard, key)) = &queue
            && ahead > SERIAL_WAITING
        {
            self.holds.overflow(*shard, key, position);
            return;
        }
        self.holds.taken(&topic, shard, position);
        record.attempts = self.holds.attempts(shard, position, key.as_ref());
        let bytes = record.message.size();
        self.bytes += bytes;
        if let Some(owned) = self.leasing.owned.get_mut(&shard) {
            owned.in_flight += 1;
        }
        self.flights.insert(
            (shard, position),
            Flight {
                record: record.reference(),
                topic,
                key,
                bytes,
                attempts: record.attempts,
                stage: Stage::Ready,
            },
        );
        if let Some(key) = queue {
            let queue: &mut Queue = self.queues.entry(key).or_default();
            queue.unresolved += 1;
            if ahead > 0 {
                queue.waiting.push_back(record);
                return;
            }
        }
        self.publishing.ready.push_back(record);
    }

    /// Sees to it that a dropped record is asked for again.
    pub(super) fn reread(&mut self, shard: Shard, position: Position) {
        if let Some(owned) = self.leasing.owned.get_mut(&shard) {
            owned.reread_from(position);
        }
    }

    /// The server is another one: all that is known of positions is void. What the sink has may still be delivered.
    fn reset(&mut self, now: Duration) {
        for owned in self.leasing.all() {
            self.lose(owned.shard, "reset");
        }
        self.leasing_now(now);
    }

    pub(super) fn poll_promote(&mut self, now: Duration) -> Option<Command> {
        if !self.setup.scheduled
            || self.fetching.promoting.is_some()
            || self.stopping
            || now < self.fetching.promote_next
        {
            return None;
        }
        let shards = self.leasing.active();
        if shards.is_empty() {
            return None;
        }
        self.fetching.promoted.clear();
        self.fetching.promoting = Some(shards.clone());
        Some(Command::Promote { shards })
    }

    pub(super) fn promote_due(&self) -> Option<Duration> {
        let runs =
            self.setup.scheduled && self.fetching.promoting.is_none() && !self.stopping && self.reads();
        runs.then_some(self.fetching.promote_next)
    }

    /// Whether nothing that was scheduled is due, in any shard that is read.
    pub(crate) fn has_promoted(&self) -> bool {
        !self.setup.scheduled || self.reads() && self.fetching.promoted == self.leasing.active()
    }

    pub(super) fn promoted(&mut self, result: Result<Promotion>, now: Duration) {
        let asked = self.fetching.promoting.take().unwrap_or_default();
        match result {
            Ok(promotion) => {
                self.fetching.promote_failures = 0;
                for shard in promotion.lost {
                    self.note(Note::Fenced(shard));
                    let same = |owned: &OwnedShard| self.leasing.owns(owned.shard, owned.epoch);
                    if asked.iter().any(|owned| owned.shard == shard && same(owned)) {
                        self.lose(shard, "taken");
                    }
                }
                if promotion.promoted == 0 && promotion.next_in != Some(Duration::ZERO) {
                    self.fetching.promoted = asked;
                }
                let pause = promotion.next_in.unwrap_or(PROMOTE_EVERY).min(PROMOTE_EVERY);
                self.fetching.promote_next = now
                    + if promotion.promoted > 0 {
                        self.fetching.wake();
                        pause
                    } else {
                        // What is due and was not promoted waits for its producers.
                        pause.max(self.setup.config.poll_busy)
                    };
            }
            Err(error) => {
                self.fetching.promote_failures = self.fetching.promote_failures.saturating_add(1);
                let pause = PROMOTE_EVERY
                    + self
                        .setup
                        .config
                        .outage_retry
                        .pause(self.fetching.promote_failures, &mut self.random);
                self.fetching.promote_next = now + pause;
                self.store_failed("promote scheduled messages", error, pause);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::relay::config::RelayConfig;
    use crate::relay::machine::stand::{
        SECOND, Stand, failure, keyless, ms, owned, parking, published, record_of,
    };
    use crate::relay::machine::{Event, Setup};
    use crate::sink::Outcome;

    #[test]
    fn reads_pause_when_they_left_nothing_and_longer_when_they_found_nothing() {
        let mut machine = Machine::new(Setup::of_one_shard(RelayConfig {
            poll_busy: Duration::from_millis(2),
            poll_idle: Duration::from_millis(12),
            ..RelayConfig::default()
        }));
        let mut pause = |rows, more| {
            machine.pace(rows, more, Duration::from_millis(1), Duration::ZERO);
            machine.fetching.next.as_millis()
        };
        assert_eq!(pause(1, true), 0, "there is more");
        assert_eq!(pause(1, false), 2, "one came");
        assert_eq!(pause(0, false), 2, "none");
        assert_eq!(pause(0, false), 4, "none again");
        assert_eq!(pause(0, false), 8, "and again");
        assert_eq!(pause(0, false), 12, "never longer than when idle");
        assert_eq!(pause(2, false), 2, "two came");
        assert_eq!(pause(9, false), 8, "many come");
        assert_eq!(pause(1_000, false), 10, "very many come");
        assert_eq!(pause(0, true), 0, "what there is was dropped, and there is more");

        let mut machine = Stand::new(machine.setup.config).machine;
        let mut due = |took, woken| {
            machine.pace(1, false, Duration::from_millis(took), Duration::ZERO);
            machine.fetching.woken = woken;
            machine.fetch_due().map(|due| due.as_millis())
        };
        for woken in [false, true] {
            assert_eq!(due(11, woken), Some(11), "as long as the read took");
            assert_eq!(due(500, woken), Some(12), "and never longer than when idle");
        }
        machine.fetching.woken = false;
        machine.pace(0, false, Duration::ZERO, Duration::ZERO);
        machine.pace(0, false, Duration::ZERO, Duration::ZERO);
        assert_eq!(machine.fetch_due(), Some(Duration::from_millis(4)));
        machine.fetching.wake();
        assert_eq!(
            machine.fetch_due(),
            Some(Duration::from_millis(2)),
            "a wake-up ends the pause of who found nothing, and not the rest after the read"
        );
    }

    fn request(command: &Command) -> Option<Arc<FetchRequest>> {
        match command {
            Command::Fetch { request } => Some(request.clone()),
            _ => None,
        }
    }

    fn promotes(command: &Command) -> Option<()> {
        matches!(command, Command::Promote { .. }).then_some(())
    }

    fn take(stand: &mut Stand, positions: std::ops::RangeInclusive<i64>) {
        for position in positions {
            stand.machine.take(keyless("t", position));
        }
    }

    #[test]
    fn a_window_is_read_into_when_there_is_room_for_a_batch_or_for_half_of_it() {
        for (batch_rows, window_rows, reads_at, not_at) in [(4, 10, 6, 7), (6, 6, 3, 4), (1, 1, 0, 1)] {
            let reads = |rows: i64| {
                let mut stand = Stand::new(RelayConfig {
                    batch_rows,
                    window_rows,
                    ..RelayConfig::default()
                });
                take(&mut stand, 1..=rows);
                stand.machine.fetch_due().is_some()
            };
            assert!(
                reads(reads_at),
                "{batch_rows} of {window_rows}, {reads_at} in flight"
            );
            assert!(
                !reads(not_at),
                "{batch_rows} of {window_rows}, {not_at} in flight"
            );
        }
    }

    #[test]
    fn a_read_asks_for_no_more_than_there_is_room_for() {
        let mut stand = Stand::new(RelayConfig {
            batch_rows: 6,
            window_rows: 8,
            ..RelayConfig::default()
        });
        stand.outcome = None;
        take(&mut stand, 1..=3);
        let asked = stand.until(request);
        assert_eq!((asked.max_rows, asked.in_flight.len()), (5, 3));
        stand.fetched(Vec::new());
        stand.machine.drop_flight(Shard(0), Position(1));
        stand.machine.drop_flight(Shard(0), Position(2));
        assert_eq!(stand.until(request).max_rows, 6, "nor for more than a batch");
    }

    #[test]
    fn nothing_is_read_while_the_window_is_full_of_bytes() {
        let size = keyless("t", 1).message.size();
        for (window_bytes, reads) in [(size * 2 + 1, true), (size * 2, false), (size, false)] {
            let mut stand = Stand::new(RelayConfig {
                window_bytes,
                ..RelayConfig::default()
            });
            take(&mut stand, 1..=2);
            assert_eq!(stand.machine.fetch_due().is_some(), reads);
            stand.machine.resolve(Shard(0), Position(1));
            assert_eq!(
                stand.machine.bytes, size,
                "what is delivered weighs nothing any more"
            );
        }
    }

    #[test]
    fn one_read_is_out_at_a_time_and_none_by_a_relay_that_stops_or_owns_nothing() {
        let mut stand = Stand::new(RelayConfig::default());
        assert!(stand.machine.fetch_due().is_some());
        stand.until(request);
        assert_eq!(stand.machine.fetch_due(), None);
        stand.fetched(Vec::new());
        stand.machine.lose(Shard(0), "taken");
        assert_eq!(stand.machine.fetch_due(), None);
        let mut stand = Stand::new(RelayConfig::default());
        stand.tell(Event::Shutdown);
        assert_eq!(stand.machine.fetch_due(), None);
    }

    #[test]
    fn a_read_that_fails_is_repeated_after_the_pause_that_is_told_whatever_wakes_it() {
        let mut stand = Stand::new(RelayConfig::default());
        stand.until(request);
        stand.tell(Event::Fetched {
            result: Err(failure()),
        });
        let told = stand.notes().into_iter().find_map(|note| match note {
            Note::StoreFailed {
                operation: "fetch",
                pause,
                ..
            } => Some(pause),
            _ => None,
        });
        stand.tell(Event::Wake);
        assert_eq!(stand.machine.fetch_due(), Some(stand.now + told.unwrap()));
    }

    #[test]
    fn a_store_that_is_another_one_voids_all_and_is_leased_anew_at_once() {
        let mut stand = Stand::new(RelayConfig::default());
        let row = record_of(1);
        stand.sent(vec![row.clone()]);
        stand.until(request);
        let reason = "another server".to_owned();
        stand.tell(Event::Fetched {
            result: Ok(Fetched::Reset { reason }),
        });
        assert!(!stand.machine.owns(Shard(0)) && !stand.flies(&row));
        let notes = stand.notes();
        assert!(notes.iter().any(|note| matches!(note, Note::Reset { .. })));
        let lost = |note: &Note| matches!(note, Note::ShardLost { why: "reset", .. });
        assert!(notes.iter().any(lost));
        let commands = stand.wanted();
        let purges = |command: &Command| matches!(command, Command::Purge);
        assert!(commands.iter().any(purges), "{commands:?}");
        let leases = |command: &Command| matches!(command, Command::Lease { .. });
        assert!(commands.iter().any(leases), "{commands:?}");
    }

    #[test]
    fn a_relay_has_found_nothing_when_a_whole_answer_was_empty() {
        let mut stand = Stand::new(RelayConfig::default());
        let mut found_nothing = |records: Vec<Record>, more| {
            stand.until(request);
            assert!(!stand.machine.fetching.found_nothing(), "it asks");
            stand.tell(Event::Fetched {
                result: Ok(Fetched::Batch { records, more }),
            });
            stand.machine.fetching.found_nothing()
        };
        assert!(found_nothing(Vec::new(), false));
        assert!(!found_nothing(Vec::new(), true), "there is more");
        assert!(!found_nothing(vec![record_of(1)], false), "there was one");
        assert!(!found_nothing(vec![record_of(2)], true));
        assert!(found_nothing(Vec::new(), false));
    }

    #[test]
    fn an_answer_from_before_the_sink_was_purged_is_asked_for_again() {
        let mut stand = Stand::new(RelayConfig::default());
        let row = record_of(1);
        let batch = stand.sent(vec![keyless("t", 9)]);
        stand.until(request);
        stand.outcomes(batch, vec![Outcome::Outage("away".into())]);
        stand.run();
        stand.run();
        assert!(stand.machine.publishing.is_open(), "it is open again by now");
        stand.fetched(Vec::new());
        assert!(
            !stand.machine.fetching.found_nothing(),
            "an old answer says nothing"
        );
        stand.until(request);
        stand.machine.publishing.generation += 1;
        stand.fetched(vec![row.clone()]);
        assert!(!stand.flies(&row));
        let asked = stand.until(request);
        let reread = Reread {
            shard: Shard(0),
            scope: RereadScope::Shard,
            from: row.position,
        };
        assert_eq!(asked.reread, [reread]);
    }

    #[test]
    fn of_an_answer_only_what_is_still_owned_under_the_same_epoch_is_taken() {
        let setup = Setup {
            shards: 3,
            ..Setup::of_one_shard(RelayConfig::default())
        };
        let mut stand = Stand::of(setup);
        let rows = [0, 1, 2].map(|shard| Record {
            shard: Shard(shard),
            ..keyless("t", 1)
        });
        stand.until(request);
        stand.machine.lose(Shard(0), "taken");
        stand.machine.lose(Shard(1), "taken");
        stand.held[1] = owned(1, 2);
        stand.held.remove(0);
        stand.lease(stand.now);
        stand.fetched(rows.to_vec());
        assert_eq!(rows.map(|row| stand.flies(&row)), [false, false, true]);
    }

    #[test]
    fn a_hold_that_cannot_be_released_yet_is_looked_at_again_with_the_next_idle_read() {
        let mut stand = Stand::new(RelayConfig::default());
        stand.machine.fetching.idle = Duration::ZERO;
        assert_eq!(stand.machine.look_again(SECOND), SECOND + ms(1));
        stand.machine.fetching.idle = ms(7);
        assert_eq!(stand.machine.look_again(SECOND), SECOND + ms(7));
    }

    #[test]
    fn of_a_key_that_goes_one_by_one_so_many_wait_and_the_rest_is_read_later() {
        let setup = Setup {
            stops_key_at_failure: false,
            ..Setup::of_one_shard(parking())
        };
        let mut stand = Stand::of(setup);
        let waiting = i64::try_from(SERIAL_WAITING).unwrap();
        stand.rows = (1..=waiting + 5).map(record_of).collect();
        stand.rows.push(keyless("t", 99));
        stand.outcome = None;
        let commands = stand.pass(SECOND);
        assert_eq!(published(&commands), [1, 99], "one of the key, and what has none");
        assert_eq!(stand.machine.flights.len(), SERIAL_WAITING + 2);
        assert!(!stand.machine.is_idle());

        let key = record_of(1).message.order_key().unwrap();
        assert_eq!(
            stand.machine.holds.overflows[&(Shard(0), key.clone())],
            Position(waiting + 2)
        );
        stand.outcome = Some(Outcome::Delivered);
        let sent = commands.iter().find_map(|command| match command {
            Command::Publish { batch, records } => Some((*batch, records.len())),
            _ => None,
        });
        let (batch, records) = sent.unwrap();
        stand.outcomes(batch, vec![Outcome::Delivered; records]);
        stand.settles = false;
        let mut reread = Vec::new();
        let mut order = Vec::new();
        for command in stand.pass(SECOND) {
            order.extend(published(std::slice::from_ref(&command)));
            if let Command::Fetch { request } = command {
                reread.extend(request.reread.clone());
            }
        }
        assert_eq!(order[..32], (2..=waiting + 1).collect::<Vec<i64>>()[..]);
        assert_eq!(reread.len(), 1, "the rest of the key: {reread:?}");
        assert_eq!(reread[0].from, Position(waiting + 2));
        assert_eq!(reread[0].scope, RereadScope::Key(key));
        assert_eq!(order.len(), stand.rows.len() - 2, "{order:?}");
    }

    fn scheduled() -> Stand {
        Stand::of(Setup {
            scheduled: true,
            ..Setup::of_one_shard(RelayConfig::default())
        })
    }

    fn promoted(stand: &mut Stand, promotion: Promotion) -> Duration {
        stand.until(promotes);
        assert_eq!(stand.machine.promote_due(), None, "one at a time");
        assert!(stand.machine.poll_promote(stand.now).is_none());
        stand.tell(Event::Promoted {
            result: Ok(promotion),
        });
        stand.machine.promote_due().unwrap().saturating_sub(stand.now)
    }

    #[test]
    fn scheduled_messages_are_promoted_when_the_next_is_due_and_every_second_at_least() {
        let mut stand = scheduled();
        let mut pause = |promoted_rows, next_in| {
            promoted(
                &mut stand,
                Promotion {
                    promoted: promoted_rows,
                    next_in,
                    lost: Vec::new(),
                },
            )
        };
        assert_eq!(pause(0, None), SECOND);
        assert_eq!(pause(0, Some(ms(300))), ms(300));
        assert_eq!(pause(0, Some(SECOND * 9)), SECOND);
        assert_eq!(
            pause(0, Some(Duration::ZERO)),
            ms(1),
            "what is due waits for its producers"
        );
        assert_eq!(
            pause(5, Some(Duration::ZERO)),
            Duration::ZERO,
            "there may be more"
        );
        assert_eq!(pause(5, None), SECOND);
    }

    #[test]
    fn what_was_promoted_is_read_at_once() {
        let mut stand = scheduled();
        stand.pass(SECOND * 3);
        stand.machine.fetching.next = stand.now + SECOND;
        stand.machine.fetching.rest = stand.now;
        stand.machine.fetching.promote_next = stand.now;
        promoted(&mut stand, Promotion::default());
        assert!(stand.machine.fetch_due() > Some(stand.now), "nothing was");
        stand.machine.fetching.promote_next = stand.now;
        promoted(
            &mut stand,
            Promotion {
                promoted: 1,
                ..Promotion::default()
            },
        );
        assert_eq!(stand.machine.fetch_due(), Some(stand.now));
    }

    #[test]
    fn a_promotion_that_fails_is_told_and_repeated_after_a_second_and_a_pause() {
        let mut stand = scheduled();
        stand.until(promotes);
        stand.tell(Event::Promoted {
            result: Err(failure()),
        });
        let told = stand.notes().into_iter().find_map(|note| match note {
            Note::StoreFailed { pause, .. } => Some(pause),
            _ => None,
        });
        let pause = told.unwrap();
        assert!(pause > SECOND && pause <= SECOND + ms(100), "{pause:?}");
        assert_eq!(stand.machine.promote_due(), Some(stand.now + pause));
    }

    #[test]
    fn a_promotion_that_is_refused_takes_away_only_what_it_was_asked_for() {
        let mut stand = Stand::of(Setup {
            scheduled: true,
            shards: 3,
            ..Setup::of_one_shard(RelayConfig::default())
        });
        stand.until(promotes);
        stand.machine.lose(Shard(1), "taken");
        stand.held[1] = owned(1, 2);
        stand.lease(stand.now);
        stand.notes();
        stand.tell(Event::Promoted {
            result: Ok(Promotion {
                lost: vec![Shard(0), Shard(1)],
                ..Promotion::default()
            }),
        });
        let owns = [0, 1, 2].map(|shard| stand.machine.owns(Shard(shard)));
        assert_eq!(owns, [false, true, true], "the second is ours anew");
        let fenced = |note: &&Note| matches!(note, Note::Fenced(_));
        assert_eq!(stand.notes().iter().filter(fenced).count(), 2);
    }

    #[test]
    fn nothing_is_promoted_where_nothing_can_be_or_by_a_relay_that_stops_or_owns_nothing() {
        let mut without = Stand::new(RelayConfig::default());
        assert_eq!(without.machine.promote_due(), None);
        assert!(
            without
                .pass(SECOND * 3)
                .iter()
                .all(|command| promotes(command).is_none())
        );

        let mut stand = scheduled();
        assert!(stand.machine.promote_due().is_some());
        stand.machine.lose(Shard(0), "taken");
        assert_eq!(stand.machine.promote_due(), None);
        let mut stand = scheduled();
        stand.settles = false;
        stand.machine.settle_delivered(Shard(0), record_of(1).reference());
        stand.tell(Event::Shutdown);
        assert_eq!(stand.machine.promote_due(), None);
        assert!(
            stand
                .pass(SECOND * 3)
                .iter()
                .all(|command| promotes(command).is_none())
        );
    }
}
