//! Two relays, two keys, three messages, one crash, one lease that runs out: every world that there can be.
//!
//! The leases and the fence are the real ones, the rest is as small as it can be: what a relay reads it publishes one by
//! one and settles one by one. Nobody tells a relay that its lease is over, so one whose lease has run out goes on as if
//! nothing had happened: the one way in which a message arrives twice.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "clippy takes only #[test] functions for tests"
)]

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use outbox_core::{
    Epoch, LeaseRequest, LeaseTable, MessageId, OwnedShard, Position, RecordRef, RelayId, Settlement, Shard,
    ShardSettlement,
};
use stateright::{Checker, Model, Property};

/// The key of each message, by its number.
const KEYS: [char; 3] = ['a', 'a', 'b'];
const SHARD: Shard = Shard(0);
/// By the database's clock.
const LEASE: Duration = Duration::from_millis(10);

type Number = usize;

/// A world, by what is wrong in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum World {
    Sound,
    /// The store does not look at epochs.
    NoFence,
    /// Relays settle what they have read, and publish it then.
    SettlesFirst,
    /// A relay that has less in its hands than there is reads from the end.
    NewestFirst,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct State {
    now: i64,
    leases: LeaseTable,
    relays: [Relay; 2],
    /// Which messages are in the outbox.
    rows: BTreeSet<Number>,
    /// What the destination has, in order, and from whom.
    log: Vec<(Number, usize)>,
    /// Under which epoch each message was settled, and which it was then.
    settled: Vec<(Epoch, Epoch)>,
    crashed: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
struct Relay {
    /// The epoch that it believes to hold.
    epoch: Option<Epoch>,
    /// What it has read.
    read: VecDeque<Number>,
    /// What it has published and not settled; the other way round where it settles first.
    half_done: VecDeque<Number>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Action {
    Lease(usize),
    Fetch(usize),
    /// Publishes what it has read.
    Begin(usize),
    /// Settles what it has published.
    Finish(usize),
    Crash(usize),
    /// The lease runs out.
    Expire,
}

fn name(relay: usize) -> RelayId {
    RelayId::new(["first", "second"][relay])
}

impl State {
    fn publish(&mut self, relay: usize, number: Number) {
        self.log.push((number, relay));
    }

    /// Settles a message as a store does, or says that the shard is lost.
    fn settle(&mut self, world: World, relay: usize, number: Number) -> bool {
        let Some(epoch) = self.relays[relay].epoch else {
            return false;
        };
        let held = match world {
            World::NoFence => vec![OwnedShard { shard: SHARD, epoch }],
            _ => self.leases.held_by(&name(relay), self.now),
        };
        let mut part = ShardSettlement::new(SHARD, epoch);
        part.delivered.push(RecordRef {
            position: Position(i64::try_from(number).unwrap()),
            id: MessageId::from_bytes([u8::try_from(number).unwrap(); 16]),
        });
        let settlement = Settlement {
            relay: name(relay),
            shards: vec![part],
        };
        let (kept, lost) = settlement.fence(&held);
        for record in kept.iter().flat_map(|part| &part.delivered) {
            if self.rows.remove(&usize::try_from(record.position.0).unwrap()) {
                let present = Epoch(self.leases.leases[&SHARD].epoch);
                self.settled.push((epoch, present));
            }
        }
        lost.is_empty()
    }

    fn has_arrived(&self, number: Number) -> bool {
        self.log.iter().any(|(own, _)| *own == number)
    }

    fn arrived_twice(&self) -> bool {
        let numbers: BTreeSet<Number> = self.log.iter().map(|(number, _)| *number).collect();
        numbers.len() < self.log.len()
    }
}

impl Model for World {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State {
            now: 0,
            leases: LeaseTable::new(1),
            relays: [Relay::default(), Relay::default()],
            rows: (0..KEYS.len()).collect(),
            log: Vec::new(),
            settled: Vec::new(),
            crashed: false,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        for (index, relay) in state.relays.iter().enumerate() {
            if relay.epoch.is_none() {
                actions.push(Action::Lease(index));
                continue;
            }
            if relay.read.is_empty() && relay.half_done.is_empty() {
                actions.push(Action::Fetch(index));
            }
            if !relay.read.is_empty() {
                actions.push(Action::Begin(index));
            }
            if !relay.half_done.is_empty() {
                actions.push(Action::Finish(index));
            }
            if !state.crashed {
                actions.push(Action::Crash(index));
            }
        }
        if state.now == 0 && state.leases.leases[&SHARD].owner.is_some() {
            actions.push(Action::Expire);
        }
    }

    fn next_state(&self, before: &State, action: Action) -> Option<State> {
        let mut state = before.clone();
        match action {
            Action::Lease(relay) => {
                let request = LeaseRequest {
                    relay: name(relay),
                    want: 1,
                    ttl: LEASE,
                };
                let held = state.leases.lease(&request, state.now).held;
                state.relays[relay].epoch = held.first().map(|owned| owned.epoch);
            }
            // All that there is: it has nothing in its hands.
            Action::Fetch(relay) => {
                let read = state.rows.iter().copied();
                state.relays[relay].read = if *self == Self::NewestFirst {
                    read.rev().collect()
                } else {
                    read.collect()
                };
            }
            Action::Begin(relay) => {
                let number = state.relays[relay].read.pop_front()?;
                state.relays[relay].half_done.push_back(number);
                if *self != Self::SettlesFirst {
                    state.publish(relay, number);
                } else if !state.settle(*self, relay, number) {
                    state.relays[relay] = Relay::default();
                }
            }
            Action::Finish(relay) => {
                let number = state.relays[relay].half_done.pop_front()?;
                if *self == Self::SettlesFirst {
                    state.publish(relay, number);
                } else if !state.settle(*self, relay, number) {
                    // Now it knows.
                    state.relays[relay] = Relay::default();
                }
            }
            Action::Crash(relay) => {
                state.crashed = true;
                state.relays[relay] = Relay::default();
            }
            Action::Expire => state.now = state.leases.leases[&SHARD].until,
        }
        (state != *before).then_some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::<Self>::always("nothing is lost", |_, state: &State| {
                (0..KEYS.len()).all(|number| state.rows.contains(&number) || state.has_arrived(number))
            }),
            Property::<Self>::always(
                "of each key nothing comes before its predecessor",
                |_, state: &State| {
                    let mut seen = BTreeSet::new();
                    state.log.iter().all(|(number, _)| {
                        seen.insert(*number);
                        (0..*number).all(|before| KEYS[before] != KEYS[*number] || seen.contains(&before))
                    })
                },
            ),
            Property::<Self>::always(
                "nothing is settled under an epoch that is over",
                |_, state: &State| state.settled.iter().all(|(settled, present)| settled == present),
            ),
            Property::<Self>::always(
                "nothing arrives twice without a crash or a lease that runs out",
                |_, state: &State| !state.arrived_twice() || state.crashed || state.now > 0,
            ),
            Property::<Self>::sometimes(
                "one whose lease ran out publishes what its heir has published",
                |_, state: &State| {
                    let Some(((number, relay), before)) = state.log.split_last() else {
                        return false;
                    };
                    !state.crashed
                        && state.leases.leases[&SHARD].owner != Some(name(*relay))
                        && before.iter().any(|(own, other)| own == number && other != relay)
                },
            ),
            Property::<Self>::sometimes(
                "all is settled after a crash and a take-over",
                |_, state: &State| state.crashed && state.now > 0 && state.rows.is_empty(),
            ),
        ]
    }
}

fn broken(world: World) -> Vec<&'static str> {
    let checker = world.checker().threads(2).spawn_bfs().join();
    println!("{world:?}: {} states", checker.unique_state_count());
    let properties = world.properties();
    let found = checker.discoveries();
    let always = properties
        .iter()
        .filter(|property| property.expectation == stateright::Expectation::Always);
    always
        .map(|property| property.name)
        .filter(|name| found.contains_key(name))
        .collect()
}

#[test]
fn the_epoch_keeps_every_promise_and_only_a_lost_lease_or_a_crash_repeats() {
    let checker = World::Sound.checker().threads(2).spawn_bfs().join();
    println!("{} states", checker.unique_state_count());
    checker.assert_properties();
}

#[test]
fn a_world_without_its_fence_is_found_out() {
    assert_eq!(
        broken(World::NoFence),
        ["nothing is settled under an epoch that is over"]
    );
}

#[test]
fn a_relay_that_settles_first_is_found_out() {
    assert!(broken(World::SettlesFirst).contains(&"nothing is lost"));
}

#[test]
fn a_relay_that_reads_the_newest_first_is_found_out() {
    assert!(broken(World::NewestFirst).contains(&"of each key nothing comes before its predecessor"));
}
