//! A test stand: one machine, and around it a store and a sink that answer as they are told.

use std::collections::VecDeque;
use std::time::Duration;

use super::{BatchId, Command, Event, Machine, Note, Setup};
use crate::error::{Error, ErrorKind};
use crate::fetch::{Fetched, Record, RecordRef};
use crate::hold::{Hold, HoldChange, HoldRef, HoldScope, HoldState};
use crate::lease::{Leases, RelayId};
use crate::message::Message;
use crate::relay::config::{OnFailure, RelayConfig};
use crate::scheduled::Promotion;
use crate::settle::{Settled, ShardSettlement};
use crate::shard::{Epoch, OwnedShard, Position, Shard};
use crate::sink::Outcome;

pub(super) const SECOND: Duration = Duration::from_secs(1);

pub(super) const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

impl Setup {
    /// A relay of a store with one shard, beside a sink that stops a key at a failure.
    pub(super) fn of_one_shard(config: RelayConfig) -> Self {
        Self {
            relay: RelayId::new("a"),
            config,
            shards: 1,
            dead_letters: true,
            scheduled: false,
            stops_key_at_failure: true,
            seed: 0,
        }
    }
}

/// A record of the first shard, and of one key.
pub(super) fn record_of(position: i64) -> Record {
    keyed("t", "k", position)
}

/// A record of the first shard, and of a key.
pub(super) fn keyed(topic: &str, key: &str, position: i64) -> Record {
    let message = Message::builder(topic).key(key.to_owned()).build().unwrap();
    Record {
        shard: Shard(0),
        position: Position(position),
        key_seq: None,
        attempts: 0,
        message,
        defect: None,
    }
}

/// A record of the first shard, without a key.
pub(super) fn keyless(topic: &str, position: i64) -> Record {
    Record {
        message: Message::builder(topic).build().unwrap(),
        ..record_of(position)
    }
}

pub(super) const fn owned(shard: u16, epoch: i64) -> OwnedShard {
    OwnedShard {
        shard: Shard(shard),
        epoch: Epoch(epoch),
    }
}

/// The note of a record that waits, as the store has it.
pub(super) fn hold_of(record: &Record, state: HoldState) -> Hold {
    Hold {
        shard: record.shard,
        scope: record
            .message
            .order_key()
            .map_or(HoldScope::Message, HoldScope::Key),
        head: record.reference(),
        attempts: 1,
        state,
        reason: "later".to_owned(),
    }
}

pub(super) fn failure() -> Error {
    Error::new(ErrorKind::Unavailable, "stand", "told to fail")
}

/// Parks what cannot be delivered.
pub(super) fn parking() -> RelayConfig {
    RelayConfig {
        on_failure: OnFailure::Park,
        ..RelayConfig::default()
    }
}

pub(super) struct Stand {
    pub(super) machine: Machine,
    pub(super) now: Duration,
    /// What the store counts as the machine's.
    pub(super) held: Vec<OwnedShard>,
    /// How many relays there are.
    pub(super) relays: u16,
    /// The holds that the store has.
    pub(super) holds: Vec<Hold>,
    /// What the store has to read, until it is settled.
    pub(super) rows: Vec<Record>,
    /// What each read brings, one after the other, in place of the rows.
    pub(super) reads: VecDeque<Vec<Record>>,
    /// What becomes of every record that is handed over; none is that nothing is heard.
    pub(super) outcome: Option<Outcome>,
    /// Whether settlements are answered.
    pub(super) settles: bool,
}

impl Stand {
    /// A machine that owns its one shard, and whose first read found nothing.
    pub(super) fn new(config: RelayConfig) -> Self {
        Self::of(Setup::of_one_shard(config))
    }

    /// A machine that owns all shards, and whose first read found nothing.
    pub(super) fn of(setup: Setup) -> Self {
        let mut stand = Self::apart(setup);
        stand.run();
        stand.notes();
        stand
    }

    /// A machine that has not done anything.
    pub(super) fn apart(setup: Setup) -> Self {
        Self {
            held: (0..setup.shards).map(|shard| owned(shard, 1)).collect(),
            machine: Machine::new(setup),
            now: SECOND,
            relays: 1,
            holds: Vec::new(),
            rows: Vec::new(),
            reads: VecDeque::new(),
            outcome: Some(Outcome::Delivered),
            settles: true,
        }
    }

    pub(super) fn tell(&mut self, event: Event) {
        self.machine.handle(event, self.now);
    }

    /// Whatever is wanted at present, unanswered.
    pub(super) fn wanted(&mut self) -> Vec<Command> {
        std::iter::from_fn(|| self.machine.poll(self.now)).collect()
    }

    /// Answers whatever is wanted at present, until nothing is, and says what it was.
    pub(super) fn run(&mut self) -> Vec<Command> {
        let mut all = Vec::new();
        while let Some(command) = self.machine.poll(self.now) {
            self.answer(&command);
            all.push(command);
            assert!(all.len() < 1_000, "it never rests: {:#?}", self.machine);
        }
        all
    }

    /// Answers whatever is wanted until something is that is looked for. Its answer is left to the test.
    pub(super) fn until<T>(&mut self, what: impl Fn(&Command) -> Option<T>) -> T {
        let mut looked = false;
        for _ in 0..1_000 {
            let Some(command) = self.machine.poll(self.now) else {
                let due = self.machine.next_due(self.now).expect("nothing is ever wanted");
                // A step without a command may have made one possible at once.
                let later = if looked { ms(1) } else { Duration::ZERO };
                looked = due <= self.now;
                self.now = due.max(self.now + later);
                continue;
            };
            if let Some(found) = what(&command) {
                return found;
            }
            self.answer(&command);
        }
        panic!("it is not wanted: {:#?}", self.machine)
    }

    /// Goes on for so long, answering whatever is wanted when it is wanted.
    pub(super) fn pass(&mut self, time: Duration) -> Vec<Command> {
        let end = self.now + time;
        let mut all = self.run();
        let mut looks = 0;
        while let Some(due) = self.machine.next_due(self.now).filter(|due| *due <= end) {
            self.now = due.max(self.now + Duration::from_micros(200)).min(end);
            all.extend(self.run());
            looks += 1;
            assert!(looks < 10_000, "it never rests: {:#?}", self.machine);
            if self.now == end {
                break;
            }
        }
        self.now = end;
        all.extend(self.run());
        all
    }

    pub(super) fn lease(&mut self, sent: Duration) {
        let leases = Leases {
            held: self.held.clone(),
            relays: self.relays,
            time_left: self.machine.setup.config.lease,
        };
        self.tell(Event::Leased {
            sent,
            result: Ok(leases),
        });
    }

    pub(super) fn fetched(&mut self, records: Vec<Record>) {
        self.tell(Event::Fetched {
            result: Ok(Fetched::Batch { records, more: false }),
        });
    }

    pub(super) fn outcomes(&mut self, batch: BatchId, outcomes: Vec<Outcome>) {
        self.tell(Event::Outcomes {
            batch,
            outcomes: Some(outcomes),
        });
    }

    pub(super) fn settled(&mut self) {
        self.tell(Event::Settled {
            result: Ok(Settled::default()),
        });
    }

    pub(super) fn loaded(&mut self) {
        let holds = self.holds.clone();
        self.tell(Event::HoldsLoaded { result: Ok(holds) });
    }

    fn answer(&mut self, command: &Command) {
        match command {
            Command::Lease { .. } => self.lease(self.now),
            Command::Release { shards, .. } => {
                self.held.retain(|owned| !shards.contains(owned));
                self.tell(Event::Released { result: Ok(()) });
            }
            Command::LoadHolds { .. } => self.loaded(),
            Command::Fetch { request } => {
                let admitted = |record: &&Record| {
                    let (key, topic) = (record.message.order_key(), record.message.topic().into());
                    request.admits(record.shard, record.position, &topic, key.as_ref())
                };
                let rows = || self.rows.iter().filter(admitted).cloned().collect();
                let records = self.reads.pop_front().unwrap_or_else(rows);
                self.fetched(records);
            }
            Command::Publish { batch, records } => {
                self.tell(Event::Accepted { batch: *batch });
                if let Some(outcome) = self.outcome.clone() {
                    self.outcomes(*batch, vec![outcome; records.len()]);
                }
            }
            Command::Purge => self.tell(Event::Purged),
            Command::Rebuild => self.tell(Event::Rebuilt { result: Ok(()) }),
            Command::Probe => self.tell(Event::Probed { result: Ok(()) }),
            Command::Settle { settlement } if self.settles => {
                settlement.shards.iter().for_each(|part| self.store(part));
                self.settled();
            }
            Command::Settle { .. } => {}
            Command::Promote { .. } => self.tell(Event::Promoted {
                result: Ok(Promotion::default()),
            }),
        }
    }

    /// What a settlement leaves behind.
    fn store(&mut self, part: &ShardSettlement) {
        let dead = part.dead.iter().map(|death| death.record);
        let gone: Vec<RecordRef> = part.delivered.iter().copied().chain(dead).collect();
        self.rows.retain(|row| !gone.contains(&row.reference()));
        for change in &part.holds {
            let (HoldChange::Put(Hold {
                shard, scope, head, ..
            })
            | HoldChange::Clear(HoldRef { shard, scope, head })) = change;
            self.holds.retain(|hold| {
                let of_it = hold.shard == *shard && hold.scope == *scope;
                !of_it || *scope == HoldScope::Message && hold.head != *head
            });
            if let HoldChange::Put(hold) = change {
                self.holds.push(hold.clone());
            }
        }
    }

    pub(super) fn notes(&mut self) -> Vec<Note> {
        self.machine.take_notes()
    }

    /// Whether a record is in flight.
    pub(super) fn flies(&self, record: &Record) -> bool {
        self.machine
            .flights
            .contains_key(&(record.shard, record.position))
    }

    /// Reads, and takes this in.
    pub(super) fn read(&mut self, records: Vec<Record>) {
        self.until(|command| matches!(command, Command::Fetch { .. }).then_some(()));
        self.fetched(records);
    }

    /// Takes a read's answer in, hands it over, and says in which batch.
    pub(super) fn sent(&mut self, records: Vec<Record>) -> BatchId {
        self.reads.push_back(records);
        let batch = self.until(|command| match command {
            Command::Publish { batch, .. } => Some(*batch),
            _ => None,
        });
        self.tell(Event::Accepted { batch });
        batch
    }
}

/// The positions of what was handed over, in order.
pub(super) fn published(commands: &[Command]) -> Vec<i64> {
    let batches = commands.iter().filter_map(|command| match command {
        Command::Publish { records, .. } => Some(records),
        _ => None,
    });
    batches.flatten().map(|record| record.position.0).collect()
}
