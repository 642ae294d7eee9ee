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
        self.nothing && self.asked.is_none()
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
        if !self.may_fetch() || self.leasing.owned.values().all(|owned| !owned.is_active()) {
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
        self.fetching.promoting = Some(shards.clone());
        Some(Command::Promote { shards })
    }

    pub(super) fn promote_due(&self) -> Option<Duration> {
        let runs = self.setup.scheduled
            && self.fetching.promoting.is_none()
            && !self.stopping
            && self.leasing.owned.values().any(super::leasing::Owned::is_active);
        runs.then_some(self.fetching.promote_next)
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
    use crate::lease::Leases;
    use crate::relay::config::RelayConfig;
    use crate::relay::machine::Setup;
    use crate::shard::Epoch;

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

        own_the_shard(&mut machine);
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

    /// Answers until the first read has found nothing.
    fn own_the_shard(machine: &mut Machine) {
        let now = Duration::ZERO;
        while machine.fetching.count == 0 || machine.fetching.asked.is_some() {
            match machine.poll(now).expect("it has not read yet") {
                Command::Lease { .. } => {
                    let leases = Leases {
                        held: vec![OwnedShard {
                            shard: Shard(0),
                            epoch: Epoch(1),
                        }],
                        relays: 1,
                        time_left: Duration::from_secs(10),
                    };
                    machine.leased(now, Ok(leases), now);
                }
                Command::LoadHolds { .. } => machine.holds_loaded(Ok(Vec::new()), now),
                Command::Fetch { .. } => {
                    let batch = Fetched::Batch {
                        records: Vec::new(),
                        more: false,
                    };
                    machine.fetched(Ok(batch), now);
                }
                other => panic!("{other:?}"),
            }
        }
    }
}
