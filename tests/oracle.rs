//! The oracle of the end-to-end proof is put to the proof itself: what is wrong is found, what is right passes.
#![allow(clippy::unwrap_used, reason = "clippy takes only #[test] functions for tests")]

mod proof;

use std::collections::BTreeMap;

use proof::oracle::{Arrived, Ending, Limits, Run};
use proof::stamp::{Stamp, crc32};
use proof::writer::{End, Written, resolve, unknown};

const TOPIC: &str = "proof";
const WINDOW: usize = 6;

/// A record that arrived, as the sink writes it.
fn arrived(stamp: &Stamp, partition: i32, offset: usize) -> Arrived {
    let parts = stamp.message(TOPIC).into_parts();
    let mut headers = vec![
        ("outbox-id".to_owned(), stamp.id.to_string().into_bytes()),
        (
            "content-type".to_owned(),
            parts.content_type.unwrap().as_bytes().to_vec(),
        ),
    ];
    headers.extend(
        parts
            .headers
            .iter()
            .map(|(name, value)| (name.to_owned(), value.to_vec())),
    );
    Arrived {
        partition,
        offset: i64::try_from(offset).unwrap(),
        key: parts.key.map(|key| key.to_vec()),
        payload: parts.payload.map(|payload| payload.to_vec()),
        headers,
    }
}

/// A run in which all went well: `keys` keys of `each` messages in two partitions, one rollback a key.
fn healthy(keys: usize, each: u64) -> Run {
    let mut run = Run {
        topic: TOPIC.to_owned(),
        effects: Some(BTreeMap::new()),
        ending: Some(Ending::default()),
        ..Run::default()
    };
    for n in 1..=each {
        for key in 0..keys {
            let name = format!("k{key}");
            if n == each / 2 {
                // The number is counted in the transaction, so that the next one takes it again.
                run.written.push(Written {
                    stamp: Stamp::new(&name, n),
                    end: End::RolledBack,
                });
            }
            let stamp = Stamp::new(&name, n);
            run.arrived.push(arrived(
                &stamp,
                i32::try_from(key % 2).unwrap(),
                run.arrived.len(),
            ));
            run.written.push(Written {
                stamp,
                end: End::Committed,
            });
            *run.effects.as_mut().unwrap().entry(name).or_default() += n;
        }
    }
    run
}

/// The same after crashes: each time the last few records are there again.
fn rewound(mut run: Run, crashes: usize, random: &mut fastrand::Rng) -> Run {
    let mut log = Vec::new();
    let chance = run.arrived.len() / (crashes + 1);
    for (place, record) in run.arrived.iter().enumerate() {
        log.push(record.clone());
        if (place + 1) % chance == 0 && run.limits.rewinds < crashes {
            run.limits.rewinds += 1;
            let back = random.usize(1..=WINDOW).min(place + 1);
            log.extend_from_slice(&run.arrived[place + 1 - back..=place]);
        }
    }
    run.arrived = log;
    run.limits.repeats = WINDOW;
    run
}

/// The laws that a run broke.
fn broken(run: &Run) -> Vec<&'static str> {
    run.judge().broken()
}

/// The place of the record `n` of `key` in the topic.
fn place(run: &Run, key: &str, n: u64) -> usize {
    let wanted = |record: &Arrived| {
        let stamp = Stamp::read(record.payload.as_deref().unwrap()).unwrap();
        stamp.key == key && stamp.n == n
    };
    run.arrived.iter().position(wanted).unwrap()
}

#[test]
fn a_run_in_which_all_went_well_passes() {
    let report = healthy(5, 20).judge();
    report.assert_kept();
    assert_eq!(
        (report.committed, report.rolled_back, report.distinct),
        (100, 5, 100)
    );
}

#[test]
fn rewinds_within_the_limits_pass_and_are_counted() {
    for seed in 0..200 {
        let run = rewound(healthy(3, 40), 4, &mut fastrand::Rng::with_seed(seed));
        let report = run.judge();
        report.assert_kept();
        assert!(report.duplicates >= 4 && report.rewinds >= 4 && report.most_repeats <= WINDOW);
    }
}

#[test]
fn a_redelivered_batch_is_one_rewind() {
    let mut run = healthy(1, 3);
    run.arrived.extend_from_within(..);
    run.limits = Limits {
        rewinds: 1,
        repeats: 3,
    };
    let report = run.judge();
    report.assert_kept();
    assert_eq!(
        (report.duplicates, report.rewinds, report.most_repeats),
        (3, 1, 3)
    );
}

#[test]
fn without_a_fault_a_single_duplicate_is_found() {
    let mut run = healthy(3, 10);
    run.arrived.push(run.arrived[29].clone());
    assert_eq!(broken(&run), ["I4"]);
}

#[test]
fn more_rewinds_or_longer_ones_than_there_were_faults_for_are_found() {
    let mut run = healthy(1, 10);
    run.arrived.extend_from_within(4..);
    run.limits = Limits {
        rewinds: 1,
        repeats: 6,
    };
    run.judge().assert_kept();
    run.limits = Limits {
        rewinds: 1,
        repeats: 5,
    };
    assert_eq!(broken(&run), ["I4"]);
    run.limits = Limits {
        rewinds: 0,
        repeats: 6,
    };
    assert_eq!(broken(&run), ["I4"]);
}

#[test]
fn any_lost_record_is_found_also_among_rewinds() {
    for seed in 0..200 {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut run = rewound(healthy(3, 20), 3, &mut random);
        let gone = run.arrived[random.usize(..run.arrived.len())].payload.clone();
        run.arrived.retain(|record| record.payload != gone);
        assert!(broken(&run).contains(&"I1"), "seed {seed}");
    }
}

#[test]
fn a_lost_record_is_named() {
    let mut run = healthy(2, 10);
    let gone = run.arrived.remove(place(&run, "k1", 7));
    let report = run.judge();
    assert_eq!(report.broken(), ["I1", "I3", "I5"]);
    let stamp = Stamp::read(&gone.payload.unwrap()).unwrap();
    assert!(
        report
            .to_string()
            .contains(&format!("{stamp} was committed and did not arrive")),
        "{report}"
    );
}

#[test]
fn a_record_before_its_predecessor_is_found() {
    let mut run = healthy(2, 10);
    let (earlier, later) = (place(&run, "k0", 4), place(&run, "k0", 5));
    run.arrived.swap(earlier, later);
    run.limits = Limits {
        rewinds: 9,
        repeats: 9,
    };
    assert_eq!(broken(&run), ["I3"]);
}

#[test]
fn a_key_in_two_partitions_is_found() {
    let mut run = healthy(2, 10);
    let last = place(&run, "k0", 10);
    run.arrived[last].partition = 1;
    assert_eq!(broken(&run), ["I3"]);
}

#[test]
fn what_was_rolled_back_or_never_written_is_found() {
    let mut run = healthy(2, 10);
    let rolled_back = run
        .written
        .iter()
        .find(|written| written.end == End::RolledBack)
        .unwrap()
        .stamp
        .clone();
    run.arrived.push(arrived(&rolled_back, 0, 20));
    run.arrived.push(arrived(&Stamp::new("k0", 11), 0, 21));
    let report = run.judge();
    assert_eq!((report.broken(), report.phantoms), (vec!["I2"], 2));
}

#[test]
fn every_change_of_a_byte_is_found() {
    type Damage = fn(&mut Arrived);
    let damages: [Damage; 7] = [
        |record| record.payload.as_mut().unwrap()[40] ^= 1,
        |record| record.payload = None,
        |record| record.key = Some(b"k9".to_vec()),
        |record| record.headers.swap(2, 3),
        |record| drop(record.headers.pop()),
        |record| record.headers[3].1 = "\u{fffd}\0".into(),
        |record| record.headers.push(("outbox-key-seq".into(), b"99".to_vec())),
    ];
    for (number, damage) in damages.iter().enumerate() {
        let mut run = healthy(2, 10);
        damage(&mut run.arrived[13]);
        assert!(broken(&run).contains(&"I2"), "damage {number}");
    }
}

#[test]
fn a_sequenced_outbox_sends_the_number_along() {
    let mut run = Run {
        sequenced: true,
        ..healthy(2, 10)
    };
    assert_eq!(broken(&run), ["I2"], "the numbers are missing");
    for record in &mut run.arrived {
        let n = Stamp::read(record.payload.as_deref().unwrap()).unwrap().n;
        record
            .headers
            .insert(1, ("outbox-key-seq".into(), n.to_string().into_bytes()));
    }
    run.judge().assert_kept();
    run.arrived[13].headers[1].1 = b"99".to_vec();
    assert_eq!(broken(&run), ["I2"], "a number is wrong");
}

#[test]
fn what_the_database_knows_is_unknown_no_longer() {
    let mut run = healthy(2, 10);
    let id = run.arrived[13].stamp().unwrap().id;
    let mut written = run.written.clone();
    written
        .iter_mut()
        .find(|written| written.stamp.id == id)
        .unwrap()
        .end = End::Unknown;
    assert_eq!(unknown(&written), [id]);
    for (committed, law) in [(true, "I1"), (false, "I2")] {
        run.written.clone_from(&written);
        resolve(&mut run.written, &committed.then_some(id).into_iter().collect());
        let arrived = run.arrived.clone();
        if committed {
            run.judge().assert_kept();
            run.arrived.remove(13);
        }
        assert!(broken(&run).contains(&law), "committed {committed}");
        run.arrived = arrived;
    }
}

#[test]
fn a_relay_that_keeps_resources_breaks_a_law() {
    let run = Run {
        resources: vec!["3 connections are left".to_owned()],
        ..healthy(2, 10)
    };
    assert_eq!(broken(&run), ["I7"]);
}

#[test]
fn poison_that_died_is_not_lost_and_its_successors_may_go() {
    let mut run = healthy(2, 10);
    run.effects = None;
    for n in [1, 5, 6, 10] {
        let gone = run.arrived.remove(place(&run, "k0", n));
        let id = Stamp::read(&gone.payload.unwrap()).unwrap().id;
        run.dead.push(id);
        let written = run.written.iter_mut().find(|written| written.stamp.id == id);
        written.unwrap().stamp.poison = true;
    }
    run.judge().assert_kept();
    run.dead.pop();
    assert_eq!(broken(&run), ["I1"]);
}

#[test]
fn poison_that_arrived_was_none() {
    let mut run = healthy(2, 10);
    run.written.last_mut().unwrap().stamp.poison = true;
    assert!(broken(&run).contains(&"I2"));
}

#[test]
fn a_message_that_nothing_is_wrong_with_must_not_die() {
    let mut run = healthy(2, 10);
    run.effects = None;
    let gone = run.arrived.remove(place(&run, "k0", 10));
    run.dead.push(Stamp::read(&gone.payload.unwrap()).unwrap().id);
    assert_eq!(broken(&run), ["I1"]);
}

#[test]
fn an_unknown_commit_may_have_arrived_or_not() {
    let mut run = healthy(2, 10);
    run.written.last_mut().unwrap().end = End::Unknown;
    run.judge().assert_kept();
    run.arrived.pop();
    run.effects = None;
    run.judge().assert_kept();
}

#[test]
fn effects_that_count_twice_or_not_at_all_are_found() {
    for change in [
        |sum: &mut u64| *sum += 7,
        |sum: &mut u64| *sum -= 1,
        |sum: &mut u64| *sum = 0,
    ] {
        let mut run = healthy(2, 10);
        change(run.effects.as_mut().unwrap().get_mut("k1").unwrap());
        assert_eq!(broken(&run), ["I5"]);
    }
}

#[test]
fn whatever_is_left_in_the_end_is_found() {
    for left in [
        Ending {
            backlog: 1,
            ..Ending::default()
        },
        Ending {
            held: 1,
            ..Ending::default()
        },
        Ending {
            owned_shards: 1,
            ..Ending::default()
        },
    ] {
        let run = Run {
            ending: Some(left),
            ..healthy(2, 10)
        };
        assert_eq!(broken(&run), ["I6"]);
    }
}

#[test]
fn a_writer_that_cannot_count_proves_nothing() {
    let mut run = healthy(2, 10);
    let last = run.written.last().unwrap().stamp.clone();
    run.written.push(Written {
        stamp: Stamp {
            id: outbox::MessageId::new(),
            ..last
        },
        end: End::Committed,
    });
    assert!(broken(&run).contains(&"I0"));
}

#[test]
fn the_checksum_is_the_usual_one() {
    assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
}
