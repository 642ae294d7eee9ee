//! The promise on MySQL and MariaDB, end to end. Needs both (`OUTBOX_TEST_MYSQL`, `OUTBOX_TEST_MARIADB`) and Kafka
//! (`OUTBOX_TEST_KAFKA`).

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
mod mysql;
mod stage;

mod on_mysql {
    use super::mysql::{Mysql, Own, Shared};
    use super::scenarios;

    // What hangs on the relay and the broker more than on the store is run on other stores.
    end_to_end!(Mysql<Shared>: kill_9_every_second, a_zombie_is_fenced);
    end_to_end!(Mysql<Own>: the_database_is_killed_under_load);
}

/// The same with numbers, which the oracle holds to those of the writer.
mod on_mysql_sequenced {
    use super::mysql::{Mysql, Sequenced};
    use super::scenarios;

    end_to_end!(Mysql<Sequenced>: kill_9_every_second);
}

mod on_mariadb {
    use super::mysql::{Mysql, OwnMariadb, SharedMariadb};
    use super::scenarios;

    end_to_end!(Mysql<SharedMariadb>: three_relays_without_faults, kill_9_every_second, a_zombie_is_fenced);
    end_to_end!(Mysql<OwnMariadb>: the_database_is_killed_under_load);
}

mod on_mariadb_sequenced {
    use super::mysql::{Mysql, SequencedMariadb};
    use super::scenarios;

    end_to_end!(Mysql<SequencedMariadb>: kill_9_every_second);
}
