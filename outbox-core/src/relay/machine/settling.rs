//! What became of records, gathered until it is written back.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::{Command, Machine, Note, Stage};
use crate::error::Result;
use crate::fetch::RecordRef;
use crate::hold::{HoldChange, HoldScope};
use crate::settle::{Death, Settled, Settlement, ShardSettlement};
use crate::shard::{Epoch, Shard};

#[derive(Debug, Default)]
pub(super) struct Settling {
    /// What is resolved and not yet on its way.
    pending: BTreeMap<Shard, ShardSettlement>,
    /// What is on its way, or was, with an unknown result: it is repeated until it is known.
    current: Option<Settlement>,
    busy: bool,
    /// After a failure it is not tried before.
    next: Duration,
    /// Until when a small one waits for more.
    gathers_until: Duration,
    failures: u32,
}

impl Settling {
    pub(super) fn is_empty(&self) -> bool {
        self.pending.is_empty() && self.current.is_none()
    }

    /// Forgets what belongs to a shard that was lost: it is its new owner's to deliver again.
    pub(super) fn forget(&mut self, shard: Shard) {
        self.pending.remove(&shard);
        if let Some(current) = &mut self.current {
            current.shards.retain(|part| part.shard != shard);
            // While it is under way its answer must still find it.
            if current.shards.is_empty() && !self.busy {
                self.current = None;
            }
        }
    }
}

impl Machine {
    pub(super) fn settle_delivered(&mut self, shard: Shard, record: RecordRef) {
        if let Some(part) = self.part(shard) {
            part.delivered.push(record);
        }
    }

    pub(super) fn settle_death(&mut self, shard: Shard, death: Death) {
        if let Some(part) = self.part(shard) {
            part.dead.push(death);
        }
    }

    pub(super) fn settle_hold(&mut self, change: HoldChange) {
        let shard = match &change {
            HoldChange::Put(hold) => hold.shard,
            HoldChange::Clear(hold) => hold.shard,
        };
        if let Some(part) = self.part(shard) {
            part.holds.push(change);
        }
    }

    fn part(&mut self, shard: Shard) -> Option<&mut ShardSettlement> {
        let epoch: Epoch = self.leasing.owned.get(&shard)?.epoch;
        Some(
            self.settling
                .pending
                .entry(shard)
                .or_insert_with(|| ShardSettlement::new(shard, epoch)),
        )
    }

    pub(super) fn poll_settle(&mut self, now: Duration) -> Option<Command> {
        if self.settle_due()? > now {
            return None;
        }
        if self.settling.current.is_none() {
            self.settling.current = self.gather();
        }
        let settlement = self.settling.current.clone()?;
        self.settling.busy = true;
        Some(Command::Settle {
            settlement: Arc::new(settlement),
        })
    }

    /// As much of what is pending as may go in one settlement.
    fn gather(&mut self) -> Option<Settlement> {
        let mut room = self.setup.config.settle_rows;
        let mut shards = Vec::new();
        while room > 0
            && let Some(mut entry) = self.settling.pending.first_entry()
        {
            let part = if entry.get().len() <= room || !entry.get().is_deliveries_only() {
                // What goes with a hold or a death stays together, whatever its size, which the window bounds: a
                // crash between a hold and what was delivered before its head would forget the head's attempts.
                entry.remove()
            } else {
                let part = entry.get_mut();
                let rest = part.delivered.split_off(room);
                let first = std::mem::replace(part, ShardSettlement::new(part.shard, part.epoch));
                part.delivered = rest;
                first
            };
            room = room.saturating_sub(part.len());
            shards.push(part);
        }
        (!shards.is_empty()).then(|| Settlement {
            relay: self.setup.relay.clone(),
            shards,
        })
    }

    pub(super) fn settle_due(&self) -> Option<Duration> {
        let settling = &self.settling;
        if settling.busy || settling.is_empty() {
            return None;
        }
        if settling.current.is_some() || self.stopping || self.is_pressing() {
            return Some(settling.next);
        }
        Some(settling.next.max(settling.gathers_until))
    }

    /// Whether what is pending should not wait for more: because it is much, or keeps a key back.
    fn is_pressing(&self) -> bool {
        let config = &self.setup.config;
        let enough = config.settle_rows.min(config.window_rows / 4);
        let mut rows = 0;
        self.settling.pending.values().any(|part| {
            rows += part.len();
            rows >= enough || !part.is_deliveries_only()
        })
    }

    pub(super) fn settled(&mut self, result: Result<Settled>, now: Duration) {
        self.settling.busy = false;
        self.settling.gathers_until = now + self.setup.config.settle_every;
        match result {
            Ok(settled) => {
                self.settling.failures = 0;
                let Some(settlement) = self.settling.current.take() else {
                    return;
                };
                self.committed(&settlement, &settled);
            }
            Err(error) => {
                if self
                    .settling
                    .current
                    .as_ref()
                    .is_some_and(|current| current.shards.is_empty())
                {
                    self.settling.current = None;
                }
                self.settling.failures = self.settling.failures.saturating_add(1);
                let pause = self
                    .setup
                    .config
                    .outage_retry
                    .pause(self.settling.failures, &mut self.random);
                self.settling.next = now + pause;
                self.store_failed("settle", error, pause);
            }
        }
    }

    fn committed(&mut self, settlement: &Settlement, settled: &Settled) {
        for shard in &settled.lost {
            self.note(Note::Fenced(*shard));
            // It may be ours again by now, under another epoch; then its part was forgotten when it was lost.
            if settlement
                .shards
                .iter()
                .any(|part| part.shard == *shard && self.leasing.owns(part.shard, part.epoch))
            {
                self.lose(*shard, "taken");
            }
        }
        for part in &settlement.shards {
            if !self.leasing.owns(part.shard, part.epoch) {
                continue;
            }
            for record in part
                .delivered
                .iter()
                .chain(part.dead.iter().map(|death| &death.record))
            {
                self.remove_flight(part.shard, record.position);
            }
        }
        let puts = || {
            settlement
                .shards
                .iter()
                .flat_map(|part| &part.holds)
                .filter_map(|change| match change {
                    HoldChange::Put(hold) => Some(hold),
                    HoldChange::Clear(_) => None,
                })
        };
        for hold in puts().filter(|hold| !matches!(hold.scope, HoldScope::Topic(_))) {
            // The head may be in flight only because its hold was not written yet. A topic's is not, and if it is again, it
            // was read since, and what became of it is another settlement's.
            let place = (hold.shard, hold.head.position);
            if self
                .flights
                .get(&place)
                .is_some_and(|flight| flight.stage == Stage::Resolved)
            {
                self.remove_flight(place.0, place.1);
            }
        }
        self.holds.committed(puts());
        self.shed_crowded();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fetch::{Fetched, Record};
    use crate::hold::{Hold, HoldState};
    use crate::lease::Leases;
    use crate::relay::config::RelayConfig;
    use crate::relay::machine::stand::{Stand, failure, ms, owned, record_of};
    use crate::relay::machine::{Event, Setup};
    use crate::shard::{OwnedShard, Position};
    use crate::sink::Outcome;

    const SHARD: Shard = Shard(0);

    fn leased(sent: Duration, epoch: i64) -> Event {
        let held = vec![OwnedShard {
            shard: SHARD,
            epoch: Epoch(epoch),
        }];
        let leases = Leases {
            held,
            relays: 1,
            time_left: Duration::from_secs(10),
        };
        Event::Leased {
            sent,
            result: Ok(leases),
        }
    }

    /// Answers everything but settlements, until nothing is wanted any more.
    fn run(machine: &mut Machine, now: Duration, epoch: i64, rows: &mut Vec<Record>) {
        while let Some(command) = machine.poll(now) {
            let answer = match command {
                Command::Lease { .. } => leased(now, epoch),
                Command::LoadHolds { .. } => Event::HoldsLoaded {
                    result: Ok(Vec::new()),
                },
                Command::Fetch { .. } => {
                    let records = std::mem::take(rows);
                    Event::Fetched {
                        result: Ok(Fetched::Batch { records, more: false }),
                    }
                }
                Command::Publish { batch, records } => {
                    machine.handle(Event::Accepted { batch }, now);
                    let outcomes = Some(vec![Outcome::Delivered; records.len()]);
                    Event::Outcomes { batch, outcomes }
                }
                _ => continue,
            };
            machine.handle(answer, now);
        }
    }

    #[test]
    fn a_refusal_under_an_old_epoch_takes_nothing_of_the_new_one() {
        let mut machine = Machine::new(Setup::of_one_shard(RelayConfig::default()));
        let mut rows = vec![record_of(1)];
        run(&mut machine, Duration::ZERO, 1, &mut rows);
        assert!(machine.settling.busy, "the delivery is being settled");

        // The lease runs out before the answer, and the shard is gained anew.
        let later = Duration::from_secs(60);
        run(&mut machine, later, 2, &mut rows);
        assert!(machine.leasing.owns(SHARD, Epoch(2)));

        let lost = vec![SHARD];
        machine.handle(
            Event::Settled {
                result: Ok(Settled { lost }),
            },
            later,
        );
        assert!(machine.leasing.owns(SHARD, Epoch(2)));
        let fenced = |note: &Note| matches!(note, Note::Fenced(_));
        assert!(machine.take_notes().iter().any(fenced));
    }

    #[test]
    fn a_refusal_takes_the_shard_away() {
        let mut machine = Machine::new(Setup::of_one_shard(RelayConfig::default()));
        run(&mut machine, Duration::ZERO, 1, &mut vec![record_of(1)]);
        assert!(machine.settling.busy, "the delivery is being settled");
        let lost = vec![SHARD];
        machine.handle(
            Event::Settled {
                result: Ok(Settled { lost }),
            },
            Duration::ZERO,
        );
        assert!(!machine.leasing.owns(SHARD, Epoch(1)));
        assert!(machine.is_empty(), "what was in flight is its new owner's");
    }

    #[test]
    fn a_note_of_a_topic_that_is_committed_late_takes_nothing_out_of_flight() {
        let mut machine = Machine::new(Setup::of_one_shard(RelayConfig::default()));
        run(&mut machine, Duration::ZERO, 1, &mut Vec::new());
        let row = record_of(1);
        machine.settle_hold(HoldChange::Put(Hold {
            shard: SHARD,
            scope: HoldScope::Topic("t".into()),
            head: row.reference(),
            attempts: 1,
            state: HoldState::Retrying {
                due_in: Duration::ZERO,
            },
            reason: "forbidden".to_owned(),
        }));
        assert!(machine.poll_settle(Duration::ZERO).is_some());

        // Before that is committed, the topic flows again, and its message is delivered.
        let later = Duration::from_millis(100);
        run(&mut machine, later, 1, &mut vec![row]);
        let in_flight = |machine: &Machine| machine.flights.contains_key(&(SHARD, Position(1)));
        assert!(in_flight(&machine), "its delivery is not settled");
        machine.handle(
            Event::Settled {
                result: Ok(Settled::default()),
            },
            later,
        );
        assert!(in_flight(&machine), "its delivery is not settled even now");
    }

    #[test]
    fn a_small_settlement_waits_for_more_and_one_that_keeps_a_key_back_does_not() {
        let mut machine = Machine::new(Setup::of_one_shard(RelayConfig {
            settle_every: Duration::from_millis(20),
            settle_rows: 3,
            ..RelayConfig::default()
        }));
        run(&mut machine, Duration::ZERO, 1, &mut Vec::new());
        let record = |position| RecordRef {
            position: Position(position),
            id: crate::MessageId::new(),
        };

        machine.settle_delivered(SHARD, record(1));
        assert_eq!(machine.settle_due(), Some(ms(0)), "none went before");
        assert!(machine.poll_settle(ms(5)).is_some());
        machine.settled(Ok(Settled { lost: Vec::new() }), ms(6));
        assert_eq!(machine.settle_due(), None, "nothing is pending");

        machine.settle_delivered(SHARD, record(2));
        machine.settle_delivered(SHARD, record(3));
        assert_eq!(machine.settle_due(), Some(ms(26)));
        assert!(machine.poll_settle(ms(25)).is_none());
        machine.settle_delivered(SHARD, record(4));
        assert_eq!(machine.settle_due(), Some(ms(0)), "it is full");
        assert!(machine.poll_settle(ms(7)).is_some());
        machine.settled(Ok(Settled { lost: Vec::new() }), ms(8));

        machine.settle_death(
            SHARD,
            Death {
                record: record(5),
                attempts: 1,
                reason: "poison".into(),
            },
        );
        assert_eq!(machine.settle_due(), Some(ms(0)), "its key waits for it");
        assert!(machine.poll_settle(ms(9)).is_some());
        machine.settled(Ok(Settled { lost: Vec::new() }), ms(10));

        machine.settle_delivered(SHARD, record(6));
        assert_eq!(machine.settle_due(), Some(ms(30)));
        machine.handle(Event::Shutdown, ms(11));
        assert_eq!(machine.settle_due(), Some(ms(0)), "nothing comes any more");
    }

    fn reference(position: i64) -> RecordRef {
        record_of(position).reference()
    }

    fn death(position: i64) -> Death {
        Death {
            record: reference(position),
            attempts: 1,
            reason: "poison".into(),
        }
    }

    /// A machine of two shards.
    fn stand(config: RelayConfig) -> Stand {
        Stand::of(Setup {
            shards: 2,
            ..Setup::of_one_shard(config)
        })
    }

    fn settlement(command: &Command) -> Option<Settlement> {
        match command {
            Command::Settle { settlement } => Some(Settlement::clone(settlement)),
            _ => None,
        }
    }

    #[test]
    fn a_settlement_is_no_larger_than_allowed_and_the_rest_follows_in_order() {
        let mut stand = stand(RelayConfig {
            settle_rows: 3,
            ..RelayConfig::default()
        });
        for at in 1..=5 {
            stand.machine.settle_delivered(Shard(0), reference(at));
        }
        for at in 6..=7 {
            stand.machine.settle_delivered(Shard(1), reference(at));
        }
        for parts in [&[&[1, 2, 3][..]][..], &[&[4, 5], &[6]], &[&[7]]] {
            let settlement = stand.until(settlement);
            let positions = |part: &ShardSettlement| -> Vec<i64> {
                part.delivered.iter().map(|record| record.position.0).collect()
            };
            let found: Vec<Vec<i64>> = settlement.shards.iter().map(positions).collect();
            assert_eq!(found, parts);
            assert_eq!(stand.machine.settle_due(), None, "one after the other");
            stand.settled();
        }
        assert!(stand.machine.settling.is_empty());
    }

    #[test]
    fn what_goes_with_a_failure_stays_together_however_much_it_is() {
        let mut stand = stand(RelayConfig {
            settle_rows: 3,
            ..RelayConfig::default()
        });
        for at in 1..=5 {
            stand.machine.settle_delivered(Shard(0), reference(at));
        }
        stand.machine.settle_death(Shard(0), death(6));
        stand.machine.settle_delivered(Shard(1), reference(7));
        let first = stand.until(settlement);
        assert_eq!(first.shards.len(), 1, "and nothing else has room");
        assert_eq!(
            (first.shards[0].delivered.len(), first.shards[0].dead.len()),
            (5, 1)
        );
    }

    #[test]
    fn a_quarter_of_the_window_is_much_over_all_shards() {
        let mut stand = stand(RelayConfig {
            batch_rows: 2,
            window_rows: 10,
            ..RelayConfig::default()
        });
        stand.machine.settling.gathers_until = stand.now + ms(15);
        stand.machine.settle_delivered(Shard(0), reference(1));
        assert_eq!(
            stand.machine.settle_due(),
            Some(stand.now + ms(15)),
            "a small one waits"
        );
        stand.machine.settle_delivered(Shard(1), reference(2));
        assert_eq!(stand.machine.settle_due(), Some(Duration::ZERO));
    }

    #[test]
    fn a_settlement_whose_result_is_unknown_is_repeated_as_it_was_after_the_pause_that_is_told() {
        let mut stand = stand(RelayConfig::default());
        stand.machine.settle_delivered(Shard(0), reference(1));
        let first = stand.until(settlement);
        stand.machine.settle_delivered(Shard(0), reference(2));
        stand.tell(Event::Settled {
            result: Err(failure()),
        });
        let told = stand.notes().into_iter().find_map(|note| match note {
            Note::StoreFailed {
                operation: "settle",
                pause,
                ..
            } => Some(pause),
            _ => None,
        });
        let due = stand.now + told.unwrap();
        assert_eq!(stand.machine.settle_due(), Some(due), "it does not wait for more");
        assert_eq!(stand.until(settlement), first);
        assert!((due..due + ms(2)).contains(&stand.now));
    }

    #[test]
    fn what_waits_to_be_settled_goes_with_its_shard_and_what_is_on_its_way_stays_until_it_is_answered() {
        for answered in [false, true] {
            let mut stand = stand(RelayConfig::default());
            stand.machine.settle_delivered(Shard(0), reference(1));
            stand.until(settlement);
            stand.machine.settle_delivered(Shard(0), reference(2));
            stand.machine.settle_delivered(Shard(1), reference(3));
            if answered {
                stand.tell(Event::Settled {
                    result: Err(failure()),
                });
            }
            stand.machine.lose(Shard(0), "taken");
            assert_eq!(stand.machine.settling.current.is_some(), !answered);
            if !answered {
                stand.settled();
            }
            let next = stand.until(settlement);
            let shards: Vec<Shard> = next.shards.iter().map(|part| part.shard).collect();
            assert_eq!(shards, [Shard(1)]);
        }
    }

    #[test]
    fn of_a_settlement_with_a_lost_shard_the_other_is_repeated() {
        let mut stand = stand(RelayConfig::default());
        stand.machine.settle_delivered(Shard(0), reference(1));
        stand.machine.settle_delivered(Shard(1), reference(2));
        stand.until(settlement);
        stand.tell(Event::Settled {
            result: Err(failure()),
        });
        stand.machine.lose(Shard(0), "taken");
        let next = stand.until(settlement);
        assert_eq!(next.shards.len(), 1);
        assert_eq!(next.shards[0].shard, Shard(1));
    }

    #[test]
    fn a_refusal_of_one_shard_under_an_old_epoch_takes_nothing_though_another_went_with_it() {
        let mut stand = stand(RelayConfig::default());
        stand.machine.settle_delivered(Shard(0), reference(1));
        stand.machine.settle_delivered(Shard(1), reference(2));
        stand.until(settlement);
        stand.machine.lose(Shard(0), "expired");
        stand.held[0] = owned(0, 2);
        stand.lease(stand.now);
        stand.tell(Event::Settled {
            result: Ok(Settled { lost: vec![Shard(0)] }),
        });
        assert!(stand.machine.leasing.owns(Shard(0), Epoch(2)));
    }
}
