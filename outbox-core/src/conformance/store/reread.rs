//! What was returned, was not delivered and is wanted again comes again; and nobody starves meanwhile.

use super::super::harness::StoreHarness;
use super::super::kit::{Bench, LONG, Relay, numbered, of_key, order_key, retrying, sorted, texts};
use crate::fetch::{Record, Reread, RereadScope};
use crate::lease::Membership;
use crate::shard::Position;

/// A key that is wanted again from a position comes again from there, whole and in order, told once.
pub async fn reread_key<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    bench.commit(&bench.series("a", 6)).await;
    bench.commit(&bench.series("b", 3)).await;
    let records = owner.drain_without_settling().await;
    let (a, b): (Vec<_>, Vec<_>) = records
        .into_iter()
        .partition(|record| record.message.key().is_some_and(|key| key == "a".as_bytes()));
    owner.deliver(&b).await;
    owner.deliver(&a[..2]).await;
    let first = &a[2];
    owner.forget(&a);
    owner.want(first, RereadScope::Key(order_key(first)));
    bench.commit(&[bench.keyed("a", "a7")]).await;
    assert_eq!(
        texts(&owner.drain_by(2).await),
        ["a3", "a4", "a5", "a6", "a7"],
        "a key that is wanted again must come again from that position on, before what follows"
    );
}

/// A keyless message that is wanted again comes again, alone.
pub async fn reread_message<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    let messages: Vec<_> = (0..5).map(|number| bench.keyless(&format!("{number}"))).collect();
    bench.commit(&messages).await;
    let records = owner.drain_without_settling().await;
    let again = records
        .iter()
        .find(|record| texts(&[(*record).clone()]) == ["2"])
        .unwrap()
        .clone();
    owner.forget(std::slice::from_ref(&again));
    owner.want(&again, RereadScope::Message);
    assert_eq!(
        texts(&owner.drain().await),
        ["2"],
        "the keyless message that is wanted again must come again; the others are in flight"
    );
}

/// A whole shard that is wanted again comes again.
pub async fn reread_shard<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    bench.commit(&bench.series("a", 5)).await;
    let keyless: Vec<_> = (0..5).map(|number| bench.keyless(&format!("{number}"))).collect();
    bench.commit(&keyless).await;
    let records = owner.drain_without_settling().await;
    owner.forget(&records);
    for owned in owner.owned.clone() {
        owner.reread.push(Reread {
            shard: owned.shard,
            scope: RereadScope::Shard,
            from: Position::MIN,
        });
    }
    let again = owner.drain_by(3).await;
    assert_eq!(
        sorted(&again),
        sorted(&records),
        "a shard that is wanted again must come again, all of it"
    );
    if bench.can.keys {
        assert_eq!(of_key(&again, "a"), numbered("a", 5), "and in order");
    }
}

/// What a reader passed over because it was held comes back as soon as it is not held any more, told or not.
pub async fn passed_over_comes_back<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    bench.commit(&bench.series("a", 3)).await;
    bench.commit(&[bench.keyless("keyless")]).await;
    let records = owner.drain_without_settling().await;
    let head = records
        .iter()
        .find(|record| texts(&[(*record).clone()]) == ["a1"]);
    let head = head.unwrap().clone();
    let alone = records.iter().find(|record| record.message.key().is_none());
    let alone = alone.unwrap().clone();
    owner.heed(&retrying(&head, 1));
    owner.heed(&retrying(&alone, 1));
    // The cursor goes on, past what is held and past what is enqueued behind it meanwhile.
    let near = bench.neighbours("a", 1).swap_remove(0);
    bench
        .commit(&[bench.keyed("a", "a4"), bench.keyed(&near, "b1")])
        .await;
    assert_eq!(texts(&owner.drain().await), ["b1"]);
    // An operator let the keyless message go; of the key only what was returned before is asked for again.
    owner.held = crate::fetch::Held::default();
    owner.want(&head, RereadScope::Key(order_key(&head)));
    owner.want(&alone, RereadScope::Message);
    let back = owner.drain().await;
    assert_eq!(
        of_key(&back, "a"),
        numbered("a", 4),
        "what was held must come back whole, in order"
    );
    assert_eq!(back.len(), 5, "and so must a keyless message");

    // The same for a reader that has never returned it: there is nothing to be told again.
    bench.commit(&bench.series("c", 2)).await;
    let head = owner.next(1).await.swap_remove(0);
    owner.heed(&retrying(&head, 1));
    owner.reader = owner.store.reader().await.unwrap();
    let near = bench.neighbours("c", 1).swap_remove(0);
    bench.commit(&[bench.keyed(&near, "b2")]).await;
    assert_eq!(texts(&owner.drain().await), ["b2"], "the key is held");
    owner.held = crate::fetch::Held::default();
    assert_eq!(
        texts(&owner.drain().await),
        numbered("c", 2),
        "only the reader knows what it passed over: it must go back for it when the key is not held any more"
    );
}

/// A key that was held with many records behind it costs others nothing; let go, it comes whole and in order.
pub async fn held_key_lets_others_flow<H: StoreHarness>() {
    const BEHIND: usize = 1_000;
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    bench.commit(&bench.series("held", BEHIND)).await;
    let head = owner.next(5).await.swap_remove(0);
    let hold = retrying(&head, 1);
    owner.hold(hold.clone()).await;
    for round in 0..5 {
        let others: Vec<_> = (0..10)
            .map(|number| bench.keyed(&format!("other-{number}"), &format!("{round}")))
            .collect();
        bench.commit(&others).await;
        let (mut seen, mut passing) = (0, 0);
        let mut patience = 4 + 2 * usize::from(bench.can.shards);
        while patience > 0 {
            let (records, more) = owner.fetch(10).await;
            // A store may go past what is held in several fetches, and say so.
            if records.is_empty() && more && passing < BEHIND {
                passing += 1;
            } else {
                patience -= 1;
            }
            assert!(
                records
                    .iter()
                    .all(|record| record.message.order_key() != head.message.order_key()),
                "a held key must not be returned"
            );
            owner.deliver(&records).await;
            seen += records.len();
        }
        assert_eq!(seen, 10, "a held key must not keep others from being found");
    }
    owner.unhold(&hold).await;
    // While it comes back, others must still come.
    let mut back = Vec::new();
    let mut round = 0;
    while back.len() < BEHIND {
        let key = format!("other-{round}");
        bench.commit(&[bench.keyed(&key, "while")]).await;
        let (records, _) = owner.fetch(50).await;
        owner.deliver(&records).await;
        back.extend(of_key(&records, "held"));
        round += 1;
        assert!(
            round < BEHIND,
            "only {} of {BEHIND} records came in {round} fetches after the key was let go",
            back.len()
        );
    }
    assert_eq!(
        back,
        numbered("held", BEHIND),
        "a key that is let go must come whole and in order"
    );
    owner.drain().await;
}

/// A record comes within a bounded number of fetches, whatever arrives later.
pub async fn nothing_starves<H: StoreHarness>() {
    const BACKLOG: usize = 60;
    const ROWS: usize = 5;
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    let waiting: Vec<_> = (0..BACKLOG)
        .map(|number| bench.keyed(&format!("wait-{}", number % 20), "waiting"))
        .collect();
    bench.commit(&waiting).await;
    // Twice what the contract's bound is: a scenario must not be stricter than it.
    let bound = 2 * (2 * BACKLOG.div_ceil(ROWS) + usize::from(bench.can.shards));
    let mut left = BACKLOG;
    for round in 0..bound {
        // A flood of newcomers, of one hot key and of many.
        let newcomers: Vec<_> = (0..ROWS)
            .map(|number| bench.keyed(&format!("new-{}", if number < 3 { 0 } else { round }), "new"))
            .collect();
        bench.commit(&newcomers).await;
        let (records, _) = owner.fetch(ROWS).await;
        owner.deliver(&records).await;
        left -= texts(&records).iter().filter(|text| *text == "waiting").count();
        if left == 0 {
            return;
        }
    }
    panic!("{left} of {BACKLOG} records did not come within {bound} fetches, because others arrived later");
}

/// A relay that takes over begins with what its predecessor had read but not settled.
pub async fn take_over_rereads<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut first = bench.owner("first").await;
    bench.commit(&bench.series("a", 6)).await;
    let records = first.next(4).await;
    first.deliver(&records[..1]).await;
    first.release_all(Membership::Leaves).await;
    let mut second = bench.owner("second").await;
    let mut seen = texts(&records[..1]);
    seen.extend(texts(&second.drain().await));
    if !bench.can.keys {
        seen.sort_unstable();
    }
    assert_eq!(
        seen,
        numbered("a", 6),
        "what was read and not settled is undelivered: it must come to the next owner, before what follows"
    );
}

/// Futures that are dropped half-way leave nothing half-done and nothing locked.
pub async fn dropped_calls_do_no_harm<H: StoreHarness>() {
    let bench = Bench::<H>::fresh().await;
    let mut owner = bench.owner("owner").await;
    bench.commit(&bench.series("a", 40)).await;
    let mut delivered = 0;
    for round in 0..20_u64 {
        let soon = std::time::Duration::from_micros(round * 150);
        let request = owner.request(2);
        if tokio::time::timeout(soon, owner.reader.fetch(&request))
            .await
            .is_err()
        {
            owner.reader = owner.store.reader().await.unwrap();
        }
        owner.in_flight.clear();
        owner.reader = owner.store.reader().await.unwrap();
        let records = owner.next(2).await;
        let plan = records
            .iter()
            .fold(owner.plan(), |plan, record| plan.delivered(record))
            .settlement();
        let _ = tokio::time::timeout(soon, owner.store.settle(&plan)).await;
        // Its outcome is unknown: repeat it until it is known.
        let settled = owner.store.settle(&plan).await.unwrap();
        assert!(settled.lost.is_empty(), "nobody took a shard over");
        delivered += records.len();
        owner.in_flight.clear();
        let request = crate::lease::LeaseRequest {
            relay: owner.id.clone(),
            want: bench.can.shards,
            ttl: LONG,
        };
        let _ = tokio::time::timeout(soon, owner.store.lease(&request)).await;
        let before = owner.owned.clone();
        owner.lease_all(LONG).await;
        assert_eq!(owner.owned, before, "a lease that is renewed keeps its epoch");
    }
    owner.reader = owner.store.reader().await.unwrap();
    assert_eq!(
        delivered + owner.drain().await.len(),
        40,
        "a dropped future must leave its work wholly done or not at all"
    );
}

impl Relay {
    /// Takes records out of what is in flight, without settling them.
    fn forget(&mut self, records: &[Record]) {
        self.in_flight
            .retain(|own| records.iter().all(|record| record.position != own.position));
    }

    /// Wants something again from a record on.
    fn want(&mut self, from: &Record, scope: RereadScope) {
        self.reread.push(Reread {
            shard: from.shard,
            scope,
            from: from.position,
        });
    }
}
