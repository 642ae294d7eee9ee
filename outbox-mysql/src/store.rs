//! The store: leases, holds, settlements, readers.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use outbox_core::{
    Capabilities, Count, DeadLetters, Epoch, Hold, Inspection, LeaseRequest, LeaseStatus, Leases, Membership,
    OutboxStore, OwnedShard, Parking, Reader, RelayId, Result, Retention, Scheduled, Settled, Settlement,
    Shard, Stats, WakeUp,
};
use sqlx::mysql::MySqlRow;

use crate::config::MysqlConfig;
use crate::error::During;
use crate::hold::read_hold;
use crate::reader::MysqlReader;
use crate::row::{count, number, optional_number, shard, span, text};
use crate::schema::check;
use crate::session::{Answers, Sessions};
use crate::sql::{FENCED, Sql};

/// An outbox in a MySQL or MariaDB database, as the relay and operators use it.
///
/// Cheap to clone. It has connections of its own: some for leases and operators, some for settlements, one for each
/// reader. None is in a transaction while messages are being published.
///
/// ```no_run
/// use outbox_core::OutboxStore;
/// use outbox_mysql::{MysqlConfig, MysqlStore, migrate};
///
/// # async fn example() -> outbox_mysql::Result<()> {
/// let config = MysqlConfig::new("mysql://relay:secret@db.example/shop");
/// migrate(&config).await?;
/// let store = MysqlStore::connect(config).await?;
/// assert_eq!(store.stats().await?.backlog.value(), 0);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct MysqlStore {
    pub(crate) config: Arc<MysqlConfig>,
    pub(crate) sql: Arc<Sql>,
    /// For leases and operators.
    pub(crate) control: Sessions,
    settle: Sessions,
}

impl MysqlStore {
    /// Connects to an outbox that [`migrate`](crate::migrate) has made.
    ///
    /// # Errors
    /// [`outbox_core::ErrorKind::Schema`] when the outbox is missing, of another version, or made with another ordering;
    /// `Unsupported` for a server that cannot be used; `Unavailable` for a replica; others as the server gives them.
    pub async fn connect(mut config: MysqlConfig) -> Result<Self> {
        config.check()?;
        let sql = Arc::new(Sql::new(&config));
        let most = config.max_connections / 2;
        let control = Sessions::new(&config, config.max_connections - most)?;
        let settle = Sessions::new(&config, most)?;
        config.shards = check(&control, &config, &sql).await?;
        Ok(Self {
            config: Arc::new(config),
            sql,
            control,
            settle,
        })
    }
}

#[async_trait]
impl OutboxStore for MysqlStore {
    fn capabilities(&self) -> Capabilities {
        Capabilities::all("mysql", self.config.shards, self.config.ordering)
    }

    async fn lease(&self, request: &LeaseRequest) -> Result<Leases> {
        const DURING: &str = "lease";
        let (relay, ttl) = (request.relay.as_str(), request.ttl_millis());
        let renewed = self.control.run(DURING, self.sql.renew(relay, ttl)).await?;
        let over: Vec<&str> = renewed
            .rows(2)
            .iter()
            .filter_map(|row| text(row, 0).transpose())
            .collect::<sqlx::Result<_>>()
            .during(DURING)?;
        let others = number(renewed.row(3).during(DURING)?, 0).during(DURING)?;
        let mut held = owned(renewed.rows(4)).during(DURING)?;
        if !over.is_empty() {
            self.control
                .run(DURING, self.sql.strike(over.into_iter()))
                .await?;
        }
        let lacking = usize::from(request.want).saturating_sub(held.len());
        if lacking > 0 {
            let taken = self
                .control
                .run(DURING, self.sql.take(relay, ttl, lacking))
                .await?;
            held = owned(taken.rows(1)).during(DURING)?;
        }
        Ok(Leases {
            held,
            relays: u16::try_from(others.saturating_add(1)).unwrap_or(u16::MAX),
            time_left: request.ttl,
        })
    }

    async fn release(&self, relay: &RelayId, shards: &[OwnedShard], membership: Membership) -> Result<()> {
        let leaves = membership == Membership::Leaves;
        let script = self.sql.release(relay.as_str(), shards, leaves);
        self.control.run("release", script).await.map(drop)
    }

    async fn holds(&self, shards: &[OwnedShard]) -> Result<Vec<Hold>> {
        let holds = self.control.run("holds", self.sql.holds(shards)).await?;
        holds
            .rows(0)
            .iter()
            .map(|row| read_hold(row).during("holds"))
            .collect()
    }

    async fn reader(&self) -> Result<Box<dyn Reader>> {
        Ok(Box::new(MysqlReader::connect(&self.config, &self.sql).await?))
    }

    async fn settle(&self, settlement: &Settlement) -> Result<Settled> {
        let mut settling = Cow::Borrowed(settlement);
        loop {
            let settled = self.settle.run("settle", self.sql.settle(&settling)).await?;
            let held = shards(settled.rows(FENCED)).during("settle")?;
            // All or nothing was changed. What was lost is not even tried again.
            let before = settling.shards.len();
            if held.len() == before || held.is_empty() {
                return Ok(Settled::but_for(settlement, &held));
            }
            settling.to_mut().shards.retain(|part| held.contains(&part.shard));
        }
    }

    async fn stats(&self) -> Result<Stats> {
        const DURING: &str = "stats";
        let told = self.control.run(DURING, self.sql.stats(COUNTED)).await?;
        let first = |index: usize| told.row(index).during(DURING);
        let oldest_age = match told.rows(2).first() {
            Some(row) => span(row, 0).during(DURING)?,
            None => None,
        };
        let (leases, relays) = owners(&told, 6).during(DURING)?;
        Ok(Stats {
            backlog: bounded(first(0)?).during(DURING)?,
            oldest_age,
            retrying: count(first(3)?, 0).during(DURING)?,
            parked: count(first(3)?, 1).during(DURING)?,
            dead: count(first(4)?, 0).during(DURING)?,
            scheduled: count(first(5)?, 0).during(DURING)?,
            processed: bounded(first(1)?).during(DURING)?,
            leases,
            relays,
        })
    }

    fn dead_letters(&self) -> Option<&dyn DeadLetters> {
        Some(self)
    }

    fn scheduled(&self) -> Option<&dyn Scheduled> {
        Some(self)
    }

    fn retention(&self) -> Option<&dyn Retention> {
        self.config.archive.then_some(self)
    }

    fn parking(&self) -> Option<&dyn Parking> {
        Some(self)
    }

    fn inspection(&self) -> Option<&dyn Inspection> {
        Some(self)
    }

    /// None: the servers have nothing that would wake a relay.
    fn wake_up(&self) -> Option<Box<dyn WakeUp>> {
        None
    }
}

impl fmt::Debug for MysqlStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MysqlStore")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

fn owned(rows: &[MySqlRow]) -> sqlx::Result<Vec<OwnedShard>> {
    let owned = |row| {
        Ok(OwnedShard {
            shard: shard(row, 0)?,
            epoch: Epoch(number(row, 1)?),
        })
    };
    rows.iter().map(owned).collect()
}

/// The first column of rows, as shards.
pub(crate) fn shards(rows: &[MySqlRow]) -> sqlx::Result<Vec<Shard>> {
    rows.iter().map(|row| shard(row, 0)).collect()
}

/// How far large tables are counted.
const COUNTED: u64 = 100_000;

fn bounded(row: &MySqlRow) -> sqlx::Result<Count> {
    Ok(Count::up_to(COUNTED, count(row, 0)?))
}

/// Who owns what, and who is alive, from the answers at `index` and after it.
pub(crate) fn owners(told: &Answers, index: usize) -> sqlx::Result<(Vec<LeaseStatus>, Vec<RelayId>)> {
    let leases = told
        .rows(index)
        .iter()
        .map(lease_status)
        .collect::<sqlx::Result<_>>()?;
    let name = |row| Ok(RelayId::new(text(row, 0)?.unwrap_or_default()));
    let relays = told
        .rows(index + 1)
        .iter()
        .map(name)
        .collect::<sqlx::Result<_>>()?;
    Ok((leases, relays))
}

fn lease_status(row: &MySqlRow) -> sqlx::Result<LeaseStatus> {
    let time_left = optional_number(row, 3)?.unwrap_or_default().max(0).unsigned_abs();
    Ok(LeaseStatus {
        shard: shard(row, 0)?,
        epoch: Epoch(number(row, 1)?),
        owner: text(row, 2)?.filter(|_| time_left > 0).map(RelayId::new),
        time_left: Duration::from_millis(time_left),
    })
}
