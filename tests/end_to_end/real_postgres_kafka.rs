//! The promise on PostgreSQL, end to end. Needs PostgreSQL (`OUTBOX_TEST_POSTGRES`) and Kafka (`OUTBOX_TEST_KAFKA`).

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
mod postgres;
mod stage;

use postgres::{Own, Postgres, Sequenced, Shared};

end_to_end!(Postgres<Shared>);
end_to_end!(Postgres<Own>: the_database_is_killed_under_load);

/// The same with numbers, which the oracle holds to those of the writer.
mod sequenced {
    use super::{Postgres, Sequenced, scenarios};

    end_to_end!(Postgres<Sequenced>: kill_9_every_second);
}
