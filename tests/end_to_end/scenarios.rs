//! The promise, end to end: an application on a database, `outbox relay` as processes, real Kafka, and faults.
//!
//! Each scenario is a test of every store: `end_to_end!(store::Database)` makes them. Sizes come from the environment:
//! `OUTBOX_PROOF_MESSAGES`, `OUTBOX_PROOF_KEYS`, `OUTBOX_PROOF_PRODUCERS`, and `OUTBOX_PROOF_SECONDS`, how long faults
//! go on at least. `OUTBOX_PROOF_RUNS` repeats the run in which relays are killed, and prints a line for each:
//!
//! ```sh
//! OUTBOX_PROOF_RUNS=10 cargo test -p outbox-cli --test real_postgres_kafka -- --nocapture --exact kill_9_every_second
//! ```
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "clippy takes only #[test] functions for tests"
)]

use std::time::{Duration, Instant};

use crate::proof::oracle::Limits;
use crate::proof::report::Report;
use crate::stage::database::{Database, Killable};
use crate::stage::kafka::broker;
use crate::stage::relay::Relay;
use crate::stage::services::OwnServer;
use crate::stage::{Relays, Stage, WINDOW, from_environment, say, until};

/// A test of each scenario, with this database.
macro_rules! end_to_end {
    ($database:ty) => {
        end_to_end!(
            $database: three_relays_without_faults, kill_9_every_second, sigterm_with_a_backlog, a_zombie_is_fenced,
            the_broker_is_killed_under_load
        );
    };
    ($database:ty: $($scenario:ident),+) => {
        $(
            #[test]
            fn $scenario() {
                let _turn = crate::stage::turn();
                scenarios::$scenario::<$database>();
            }
        )+
    };
}

const SECOND: Duration = Duration::from_secs(1);

/// Long enough to be renewed on a busy machine, short enough to wait for.
pub(crate) fn short_lease<D: Database>() -> Relays {
    Relays {
        lease: SECOND * D::SLOW,
        ..Relays::default()
    }
}

/// A rate at which the load lasts as long as it usually would, or longer.
fn rate<D: Database>(usual: u32) -> u32 {
    usual / (D::FEWER * D::SLOW)
}

/// How long faults go on at least.
fn duration<D: Database>() -> Duration {
    SECOND * seconds() * D::SLOW
}

fn seconds() -> u32 {
    u32::try_from(from_environment("OUTBOX_PROOF_SECONDS", 10)).unwrap()
}

/// Without faults nothing is lost, nothing arrives twice, and all is in order.
pub(crate) fn three_relays_without_faults<D: Database>() {
    let stage = Stage::<D>::new(&broker(), Relays::default());
    let mut relays: Vec<Relay> = (0..3).map(|_| stage.relay()).collect();
    stage.write(&stage.load(Duration::ZERO));
    stage.wait_until_drained(&mut relays);
    let report = stage.judge("no faults", relays, Limits::default());
    report.assert_kept();
    assert_eq!(report.duplicates, 0);
}

/// A relay is killed every second, the owner more often than not, and another started at once.
pub(crate) fn kill_9_every_second<D: Database>() {
    for run in 1..=from_environment("OUTBOX_PROOF_RUNS", 1) {
        let begin = Instant::now();
        let (kills, owners, report) = kill_9_once::<D>();
        say(&format!(
            "run {run}: {kills} kills, {owners} of owners, {} committed, {} duplicates, {} lost, {} phantoms, {} gaps, {:.1} s\n",
            report.committed,
            report.duplicates,
            report.lost,
            report.phantoms,
            report.gaps,
            begin.elapsed().as_secs_f64()
        ));
    }
}

fn kill_9_once<D: Database>() -> (usize, usize, Report) {
    let stage = Stage::<D>::new(&broker(), short_lease::<D>());
    let begin = Instant::now();
    let mut relays: Vec<Relay> = (0..3).map(|_| stage.relay()).collect();
    let (mut kills, mut owners) = (0, 0);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| stage.write(&stage.load(duration::<D>())));
        while !writer.is_finished() || begin.elapsed() < duration::<D>() {
            // Not in step with the leases, which are renewed and run out by the second, too.
            std::thread::sleep((SECOND * D::SLOW).mul_f64(0.5 + fastrand::f64()));
            relays.iter_mut().for_each(Relay::assert_alive);
            let owner = stage.owner(&relays).filter(|_| fastrand::u8(0..3) > 0);
            let victim = owner.unwrap_or_else(|| fastrand::usize(0..relays.len()));
            owners += usize::from(stage.owner(&relays) == Some(victim));
            relays.swap_remove(victim).kill();
            relays.push(stage.relay());
            kills += 1;
        }
    });
    stage.wait_until_drained(&mut relays);
    let rewinds = stage.beginnings() - 1;
    let title = format!(
        "kill -9: {kills} kills, {owners} of owners, {:.1} s",
        begin.elapsed().as_secs_f64()
    );
    let report = stage.judge(
        &title,
        relays,
        Limits {
            rewinds,
            repeats: WINDOW,
        },
    );
    report.assert_kept();
    assert!(owners > 0, "no owner was killed");
    (kills, owners, report)
}

/// SIGTERM with a backlog in flight: it ends in time, gives the outbox away at once, and nothing arrives twice.
#[allow(dead_code, reason = "for some stores")]
pub(crate) fn sigterm_with_a_backlog<D: Database>() {
    let grace = SECOND * 5;
    let stage = Stage::<D>::new(
        &broker(),
        Relays {
            grace,
            rate_limit: Some(rate::<D>(10_000)),
            ..Relays::default()
        },
    );
    stage.write(&stage.load(Duration::ZERO));
    let written = stage.backlog();
    let mut ended = 0;
    for _ in 0..3 {
        let before = stage.backlog();
        let relay = stage.relay();
        let flows = until(SECOND * 20, || (stage.backlog() < before).then_some(()));
        assert!(flows.is_some(), "nothing is delivered:\n{}", relay.log());
        let (status, took) = relay.terminate();
        assert!(status.success(), "{status}");
        assert!(took < grace, "took {took:?}");
        // Within its lease of ten seconds: it gave the outbox back.
        assert_eq!(stage.ending().owned_shards, 0);
        assert_eq!(stage.stats().relays, []);
        let left = stage.backlog();
        say(&format!("ended within {took:?}, {left} of {written} left"));
        ended += usize::from(left > 0);
    }
    assert!(ended > 0, "there was no backlog left at any end");
    let mut relays = vec![stage.relay()];
    stage.wait_until_drained(&mut relays);
    stage.judge("SIGTERM", relays, Limits::default()).assert_kept();
}

/// The owner stands still beyond its lease with messages delivered and not settled, and then goes on: it notices, and
/// its settlement, if it had one under way, is refused.
pub(crate) fn a_zombie_is_fenced<D: Database>() {
    // So slow that there is something in flight at every stop.
    let lease = SECOND * 2;
    let stage = Stage::<D>::new(
        &broker(),
        Relays {
            lease,
            rate_limit: Some(rate::<D>(1_000)),
            ..Relays::default()
        },
    );
    stage.write(&stage.load(Duration::ZERO));
    let mut relays: Vec<Relay> = (0..2).map(|_| stage.relay()).collect();
    let (mut stops, mut refused, mut losers) = (0, 0, 0);
    while refused == 0 || stops < 3 {
        assert!(stops < 6, "the store never had to refuse anything");
        let zombie = until(SECOND * 10, || stage.owner(&relays)).unwrap();
        let heir = 1 - zombie;
        let noticed = count(&relays[zombie], "shard lost");
        // Whoever owns something cannot renew it either as long as the database is held.
        losers += stage.owned(&relays).iter().filter(|owned| **owned > 0).count();
        stage.before_settlement(|| {
            relays[zombie].pause();
            let expired = until(lease * 2, || (stage.owned(&relays)[zombie] == 0).then_some(()));
            assert!(expired.is_some(), "a lease goes on without its owner");
        });
        let inherits = until(SECOND * 10, || {
            (stage.owned(&relays)[heir] == stage.shards()).then_some(())
        });
        assert!(inherits.is_some(), "nobody takes over");
        let before = stage.backlog();
        let goes_on = until(SECOND * 10, || (stage.backlog() < before).then_some(()));
        assert!(goes_on.is_some(), "the heir does nothing");
        let lost = count(&relays[heir], "shard lost");
        relays[zombie].resume();
        let notices = until(SECOND * 10, || {
            (count(&relays[zombie], "shard lost") > noticed).then_some(())
        });
        assert!(
            notices.is_some(),
            "the zombie believes to be alive:\n{}",
            relays[zombie].log()
        );
        // Of many shards it gets its share again, but only what the heir gives up.
        assert_eq!(
            count(&relays[heir], "shard lost"),
            lost,
            "the zombie took a shard back"
        );
        refused = relays
            .iter()
            .map(|relay| count(relay, "a settlement was refused"))
            .sum();
        stops += 1;
    }
    stage.wait_until_drained(&mut relays);
    // A zombie's last records may come in between those of its heir, one by one.
    let in_flight = losers * WINDOW;
    let limits = Limits {
        rewinds: in_flight,
        repeats: WINDOW,
    };
    let report = stage.judge(
        &format!("zombies: {stops} stops, {refused} refusals"),
        relays,
        limits,
    );
    report.assert_kept();
    assert!(
        report.duplicates > 0,
        "what was delivered and not settled was not delivered again"
    );
    assert!(
        report.duplicates <= in_flight,
        "more was sent again than can have been in flight"
    );
}

/// How often a relay has said so.
fn count(relay: &Relay, what: &str) -> usize {
    relay.log().matches(what).count()
}

/// The broker is killed under load, and comes back: a broker of the test's own.
#[allow(dead_code, reason = "for some stores")]
pub(crate) fn the_broker_is_killed_under_load<D: Database>() {
    let kills = seconds().div_ceil(6);
    if !cfg!(target_os = "linux") {
        return say("not run: scripts/services starts servers on Linux only");
    }
    let folder = tempfile::tempdir().unwrap();
    let broker = OwnServer::start("kafka", folder.path());
    let stage = Stage::<D>::new(&broker.variable(""), short_lease::<D>());
    let mut relays: Vec<Relay> = (0..2).map(|_| stage.relay()).collect();
    let usage = stage.usage(&mut relays);
    let begin = Instant::now();
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| stage.write(&stage.load(duration::<D>())));
        for kill in 0..kills {
            // The second time it is away for so long that the relays notice.
            std::thread::sleep(SECOND * 2);
            broker.signal("KILL");
            std::thread::sleep(SECOND * if kill == 1 { 5 } else { 1 });
            broker.restart();
        }
        writer.join().unwrap();
    });
    stage.wait_until_drained(&mut relays);
    stage.compare_usage(&usage, &mut relays);
    let down = relays
        .iter()
        .filter(|relay| relay.log().contains("the sink cannot be used"))
        .count();
    let title = format!(
        "broker: {kills} kills, {down} relays noticed, {:.1} s",
        begin.elapsed().as_secs_f64()
    );
    let rewinds = kills as usize + stage.beginnings() - 1;
    stage
        .judge(
            &title,
            relays,
            Limits {
                rewinds,
                repeats: WINDOW,
            },
        )
        .assert_kept();
}

/// The database is killed under load, and comes back with what was committed: a server of the test's own. What the
/// relay had settled last may be undone.
#[allow(dead_code, reason = "a file cannot be killed")]
pub(crate) fn the_database_is_killed_under_load<D: Killable>() {
    let kills = seconds() / 5;
    if !cfg!(target_os = "linux") {
        return say("not run: scripts/services starts servers on Linux only");
    }
    let stage = Stage::<D>::new(&broker(), short_lease::<D>());
    let mut relays: Vec<Relay> = (0..2).map(|_| stage.relay()).collect();
    let usage = stage.usage(&mut relays);
    let begin = Instant::now();
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| stage.write(&stage.load(duration::<D>())));
        for kill in 0..kills {
            std::thread::sleep(SECOND.mul_f64(1.0 + fastrand::f64()));
            assert!(!writer.is_finished(), "nobody writes at kill {kill}");
            stage.database.kill();
            std::thread::sleep(SECOND.mul_f64(1.0 + 2.0 * fastrand::f64()));
            stage.database.restart();
        }
        writer.join().unwrap();
    });
    stage.wait_until_drained(&mut relays);
    stage.compare_usage(&usage, &mut relays);
    let title = format!("database: {kills} kills, {:.1} s", begin.elapsed().as_secs_f64());
    let rewinds = kills as usize + stage.beginnings() - 1;
    stage
        .judge(
            &title,
            relays,
            Limits {
                rewinds,
                repeats: WINDOW,
            },
        )
        .assert_kept();
}
