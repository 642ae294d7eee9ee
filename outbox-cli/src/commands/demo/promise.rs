//! The promise, checked against what producers, broker and consumer noted independently of each other.

use std::collections::{BTreeMap, HashMap, HashSet};

use outbox::MessageId;
use serde::Serialize;

/// What everybody noted.
#[derive(Debug, Clone, Default)]
pub(super) struct Journal {
    /// Messages whose transaction committed.
    pub(super) committed: HashSet<MessageId>,
    /// Messages whose transaction rolled back.
    pub(super) rolled_back: HashSet<MessageId>,
    /// What the broker handed out, in its order within each customer.
    pub(super) deliveries: Vec<Delivery>,
    /// How many of them the inbox dropped.
    pub(super) dropped: usize,
    /// The shop's own books, from its business table.
    pub(super) shop: Books,
    /// The consumer's books, made from messages alone.
    pub(super) consumer: Books,
    /// What is still in the outbox.
    pub(super) left: u64,
}

/// One record that the broker handed out.
#[derive(Debug, Clone, Copy)]
pub(super) struct Delivery {
    pub(super) id: MessageId,
    pub(super) customer: i64,
    /// The customer's orders are numbered from 1 without gaps, in the order of their commits.
    pub(super) number: i64,
}

/// Orders and their sum, by customer.
pub(super) type Books = BTreeMap<i64, Account>;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Account {
    pub(super) orders: i64,
    pub(super) sum: i64,
}

/// What came of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(super) struct Verdict {
    /// Whether every part of the promise held.
    pub(super) kept: bool,
    pub(super) committed: usize,
    pub(super) rolled_back: usize,
    /// Distinct messages that the broker handed out.
    pub(super) delivered: usize,
    /// Committed, and not delivered.
    pub(super) lost: usize,
    /// Delivered, and not committed.
    pub(super) phantoms: usize,
    /// Times at which a customer's next new message was not the next in number.
    pub(super) order_gaps: usize,
    /// Deliveries of messages that had been delivered before.
    pub(super) duplicates_at_broker: usize,
    pub(super) duplicates_dropped: usize,
    /// The sum of all orders in the shop's books, and in the consumer's.
    pub(super) sum_expected: i64,
    pub(super) sum_applied: i64,
    /// Customers whose accounts differ.
    pub(super) accounts_wrong: usize,
    pub(super) left_in_outbox: u64,
    pub(super) checks: Checks,
}

/// The parts of the promise.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(super) struct Checks {
    pub(super) nothing_lost: bool,
    pub(super) no_phantoms: bool,
    pub(super) order_kept: bool,
    pub(super) effects_exactly_once: bool,
    pub(super) outbox_empty: bool,
}

impl Journal {
    pub(super) fn verdict(&self) -> Verdict {
        let delivered: HashSet<MessageId> = self.deliveries.iter().map(|delivery| delivery.id).collect();
        let accounts_wrong = self
            .shop
            .keys()
            .chain(self.consumer.keys())
            .collect::<HashSet<_>>()
            .into_iter()
            .filter(|customer| self.shop.get(*customer) != self.consumer.get(*customer))
            .count();
        let sum = |books: &Books| books.values().map(|account| account.sum).sum();
        let mut verdict = Verdict {
            kept: false,
            committed: self.committed.len(),
            rolled_back: self.rolled_back.len(),
            delivered: delivered.len(),
            lost: self.committed.difference(&delivered).count(),
            phantoms: delivered.difference(&self.committed).count(),
            order_gaps: self.order_gaps(),
            duplicates_at_broker: self.deliveries.len() - delivered.len(),
            duplicates_dropped: self.dropped,
            sum_expected: sum(&self.shop),
            sum_applied: sum(&self.consumer),
            accounts_wrong,
            left_in_outbox: self.left,
            checks: Checks::default(),
        };
        let checks = Checks {
            nothing_lost: verdict.lost == 0,
            no_phantoms: verdict.phantoms == 0,
            order_kept: verdict.order_gaps == 0,
            effects_exactly_once: accounts_wrong == 0
                && verdict.duplicates_dropped == verdict.duplicates_at_broker,
            outbox_empty: verdict.left_in_outbox == 0,
        };
        verdict.kept = checks.all();
        verdict.checks = checks;
        verdict
    }

    /// First deliveries of a customer must be 1, 2, 3, …; repetitions of earlier ones may come at any time.
    fn order_gaps(&self) -> usize {
        let mut seen = HashSet::new();
        let mut last: HashMap<i64, i64> = HashMap::new();
        let mut gaps = 0;
        for delivery in &self.deliveries {
            if !seen.insert(delivery.id) {
                continue;
            }
            let last = last.entry(delivery.customer).or_default();
            if delivery.number != *last + 1 {
                gaps += 1;
            }
            *last = delivery.number;
        }
        gaps
    }
}

impl Checks {
    const fn all(self) -> bool {
        let Self {
            nothing_lost,
            no_phantoms,
            order_kept,
            effects_exactly_once,
            outbox_empty,
        } = self;
        nothing_lost && no_phantoms && order_kept && effects_exactly_once && outbox_empty
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two customers with three orders each, delivered once, in order; one order rolled back.
    fn kept() -> Journal {
        let mut journal = Journal::default();
        for customer in [1, 2] {
            for number in 1..=3 {
                let id = MessageId::new();
                journal.committed.insert(id);
                journal.deliveries.push(Delivery { id, customer, number });
            }
            journal.shop.insert(customer, Account { orders: 3, sum: 30 });
        }
        journal.rolled_back.insert(MessageId::new());
        journal.consumer = journal.shop.clone();
        journal
    }

    #[test]
    fn a_kept_promise_is_kept() {
        let verdict = kept().verdict();
        assert!(verdict.kept, "{verdict:?}");
        assert_eq!(
            (verdict.committed, verdict.rolled_back, verdict.delivered),
            (6, 1, 6)
        );
    }

    #[test]
    fn duplicates_that_the_inbox_drops_break_nothing() {
        let mut journal = kept();
        let again = [journal.deliveries[1], journal.deliveries[2]];
        journal.deliveries.extend(again);
        journal.dropped = 2;
        let verdict = journal.verdict();
        assert!(verdict.kept, "{verdict:?}");
        assert_eq!(verdict.duplicates_at_broker, 2);
    }

    #[test]
    fn a_lost_message_breaks_it() {
        let mut journal = kept();
        journal.deliveries.pop();
        let verdict = journal.verdict();
        assert!(!verdict.kept && !verdict.checks.nothing_lost, "{verdict:?}");
        assert_eq!(verdict.lost, 1);
    }

    #[test]
    fn a_message_of_a_rolled_back_transaction_breaks_it() {
        let mut journal = kept();
        let id = *journal.rolled_back.iter().next().unwrap();
        journal.deliveries.push(Delivery {
            id,
            customer: 1,
            number: 4,
        });
        let verdict = journal.verdict();
        assert!(!verdict.kept && !verdict.checks.no_phantoms, "{verdict:?}");
        assert_eq!(verdict.phantoms, 1);
    }

    #[test]
    fn a_message_of_nobody_breaks_it() {
        let mut journal = kept();
        let id = MessageId::new();
        journal.deliveries.push(Delivery {
            id,
            customer: 2,
            number: 4,
        });
        assert_eq!(journal.verdict().phantoms, 1);
    }

    #[test]
    fn a_message_behind_its_successor_breaks_it() {
        let mut journal = kept();
        journal.deliveries.swap(1, 2);
        let verdict = journal.verdict();
        assert!(!verdict.kept && !verdict.checks.order_kept, "{verdict:?}");
        assert!(verdict.order_gaps > 0);
    }

    #[test]
    fn a_gap_that_is_filled_later_breaks_it() {
        let mut journal = kept();
        let late = journal.deliveries.remove(0);
        journal.deliveries.push(late);
        assert!(!journal.verdict().checks.order_kept);
    }

    #[test]
    fn an_effect_that_happened_twice_or_not_at_all_breaks_it() {
        for (orders, sum) in [(4, 40), (2, 20), (3, 31)] {
            let mut journal = kept();
            journal.consumer.insert(1, Account { orders, sum });
            let verdict = journal.verdict();
            assert!(
                !verdict.kept && !verdict.checks.effects_exactly_once,
                "{verdict:?}"
            );
            assert_eq!(verdict.accounts_wrong, 1);
        }
        let mut journal = kept();
        journal.consumer.insert(9, Account { orders: 1, sum: 10 });
        assert!(!journal.verdict().kept);
    }

    #[test]
    fn a_duplicate_that_the_inbox_let_through_breaks_it() {
        let mut journal = kept();
        journal.deliveries.push(journal.deliveries[0]);
        assert!(!journal.verdict().checks.effects_exactly_once);
    }

    #[test]
    fn what_stays_in_the_outbox_breaks_it() {
        let mut journal = kept();
        journal.left = 1;
        assert!(!journal.verdict().kept);
    }
}
