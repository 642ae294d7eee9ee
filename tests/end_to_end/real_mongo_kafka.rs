//! The promise on MongoDB, end to end. Needs a replica set (`OUTBOX_TEST_MONGO`) and Kafka (`OUTBOX_TEST_KAFKA`).

#[path = "../grant/mod.rs"]
mod grant;
#[path = "../proof/mod.rs"]
mod proof;
#[path = "../proxy/mod.rs"]
mod proxy;
#[path = "../proof/reader.rs"]
mod reader;
#[macro_use]
mod scenarios;
mod mongo;
mod stage;

use mongo::{Mongo, Own, Sequenced, Shared};

// What hangs on the relay and the broker more than on the store is run on other stores.
end_to_end!(Mongo<Shared>: three_relays_without_faults, kill_9_every_second, a_zombie_is_fenced);
end_to_end!(Mongo<Own>: the_database_is_killed_under_load);

/// The same with numbers, which the oracle holds to those of the writer.
mod sequenced {
    use super::{Mongo, Sequenced, scenarios};

    end_to_end!(Mongo<Sequenced>: kill_9_every_second);
}
