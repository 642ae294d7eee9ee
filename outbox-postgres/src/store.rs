//! The store: leases, holds, settlements, readers.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use outbox_core::{
    Capabilities, Count, DeadLetters, Epoch, Hold, HoldChanges, Inspection, LeaseRequest, LeaseStatus,
    Leases, Membership, OutboxStore, OwnedShard, Parking, Reader, RelayId, Result, Retention, Scheduled,
    Settled, Settlement, Shard, ShardSettlement, Stats, WakeUp,
};
use sqlx::Row;
use sqlx::postgres::{PgArguments, PgRow, Postgres};
use sqlx::query::Query;
use uuid::Uuid;

use crate::config::PostgresConfig;
use crate::error::During;
use crate::hold::{bind_changes, read_hold, storable};
use crate::reader::PostgresReader;
use crate::row::{count, number, optional_number, shard, small, span, text};
use crate::schema::check;
use crate::session::{Session, Sessions, Settings};
use crate::sql::{Sql, Statement};

/// An outbox in a PostgreSQL database, as the relay and operators use it.
///
/// Cheap to clone. It has connections of its own: some for leases and operators, some for settlements, one for each
/// reader. None is in a transaction while messages are being published.
///
/// ```no_run
/// use outbox_core::OutboxStore;
/// use outbox_postgres::{PostgresConfig, PostgresStore, migrate};
///
/// # async fn example() -> outbox_postgres::Result<()> {
/// let config = PostgresConfig::new("postgres://relay:secret@db.example/shop");
/// migrate(&config).await?;
/// let store = PostgresStore::connect(config).await?;
/// assert_eq!(store.stats().await?.backlog.value(), 0);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct PostgresStore {
    pub(crate) config: Arc<PostgresConfig>,
    pub(crate) sql: Arc<Sql>,
    /// For leases and operators: their commits wait for the disk.
    pub(crate) control: Sessions,
    /// For settlements, which need not.
    settle: Sessions,
}

impl PostgresStore {
    /// Connects to an outbox that [`migrate`](crate::migrate) has made, and checks what the relay rests on.
    ///
    /// # Errors
    /// [`outbox_core::ErrorKind::Schema`] when the outbox is missing, of another version, made with another ordering, or
    /// altered; `Unsupported` for a server that cannot be used; `Unavailable` for a standby; others as the server gives
    /// them.
    pub async fn connect(mut config: PostgresConfig) -> Result<Self> {
        config.check()?;
        let sql = Arc::new(Sql::new(&config));
        let most = config.max_connections / 2;
        let control = Sessions::new(&config, Settings::durable(&config), config.max_connections - most)?;
        let settle = Sessions::new(&config, Settings::settling(&config), most)?;
        config.shards = check(&control, &config).await?;
        Ok(Self {
            config: Arc::new(config),
            sql,
            control,
            settle,
        })
    }

    /// The statement that settles: the short one where there are deliveries and nothing else.
    fn settling<'q>(&self, settlement: &'q Settlement) -> Query<'q, Postgres, PgArguments> {
        let parts = || settlement.shards.iter();
        if !self.config.archive && parts().all(ShardSettlement::is_deliveries_only) {
            return bind_deliveries(fenced(&self.sql.deliver, settlement), settlement);
        }
        let dead = || parts().flat_map(|part| part.dead.iter().map(|death| (part.shard, death)));
        let mut holds = HoldChanges::default();
        for part in parts() {
            part.holds.iter().for_each(|change| holds.add(part.shard, change));
        }
        bind_changes(
            bind_deliveries(fenced(&self.sql.settle, settlement), settlement)
                .bind(dead().map(|(shard, _)| small(shard)).collect::<Vec<i16>>())
                .bind(
                    dead()
                        .map(|(_, death)| death.record.position.0)
                        .collect::<Vec<i64>>(),
                )
                .bind(
                    dead()
                        .map(|(_, death)| death.record.id.as_uuid())
                        .collect::<Vec<Uuid>>(),
                )
                .bind(
                    dead()
                        .map(|(_, death)| i64::from(death.attempts))
                        .collect::<Vec<i64>>(),
                )
                .bind(
                    dead()
                        .map(|(_, death)| storable(&death.reason))
                        .collect::<Vec<String>>(),
                ),
            &holds,
        )
    }
}

#[async_trait]
impl OutboxStore for PostgresStore {
    fn capabilities(&self) -> Capabilities {
        Capabilities::all("postgres", self.config.shards, self.config.ordering)
    }

    async fn lease(&self, request: &LeaseRequest) -> Result<Leases> {
        const DURING: &str = "lease";
        let (relay, ttl) = (request.relay.as_str(), request.ttl_millis());
        let mut session = self.control.open(DURING).await?;
        let renewed = session.row(self.sql.lease.query().bind(relay).bind(ttl)).await?;
        let relays = number(&renewed, 0).during(DURING)?;
        let shards: Option<Vec<i16>> = renewed.try_get(1).during(DURING)?;
        let epochs: Option<Vec<i64>> = renewed.try_get(2).during(DURING)?;
        let mut held: Vec<OwnedShard> = shards
            .unwrap_or_default()
            .into_iter()
            .zip(epochs.unwrap_or_default())
            .map(|(shard, epoch)| owned(Shard(shard.unsigned_abs()), epoch))
            .collect();
        let lacking = usize::from(request.want).saturating_sub(held.len());
        if lacking > 0 {
            let taken = session
                .rows(
                    self.sql
                        .take
                        .query()
                        .bind(relay)
                        .bind(ttl)
                        .bind(crate::row::limit(lacking)),
                )
                .await?;
            for row in &taken {
                held.push(owned(
                    shard(row, 0).during(DURING)?,
                    number(row, 1).during(DURING)?,
                ));
            }
        }
        session.finish().await?;
        held.sort_unstable();
        Ok(Leases {
            held,
            relays: u16::try_from(relays).unwrap_or(u16::MAX),
            time_left: request.ttl,
        })
    }

    async fn release(&self, relay: &RelayId, shards: &[OwnedShard], membership: Membership) -> Result<()> {
        let (numbers, epochs) = epochs(shards);
        let mut session = self.control.open("release").await?;
        session
            .changed(
                self.sql
                    .release
                    .query()
                    .bind(numbers)
                    .bind(epochs)
                    .bind(relay.as_str())
                    .bind(membership == Membership::Leaves),
            )
            .await?;
        session.finish().await
    }

    async fn holds(&self, shards: &[OwnedShard]) -> Result<Vec<Hold>> {
        let (numbers, _) = epochs(shards);
        let mut session = self.control.open("holds").await?;
        let rows = session.rows(self.sql.holds.query().bind(numbers)).await?;
        session.finish().await?;
        rows.iter().map(|row| read_hold(row).during("holds")).collect()
    }

    async fn reader(&self) -> Result<Box<dyn Reader>> {
        Ok(Box::new(PostgresReader::connect(&self.config, &self.sql).await?))
    }

    async fn settle(&self, settlement: &Settlement) -> Result<Settled> {
        let mut session = self.settle.open("settle").await?;
        let held = shards(&session.rows(self.settling(settlement)).await?)?;
        session.finish().await?;
        Ok(Settled::but_for(settlement, &held))
    }

    async fn stats(&self) -> Result<Stats> {
        const DURING: &str = "stats";
        let mut session = self.control.open(DURING).await?;
        let sql = &self.sql;
        let backlog = bounded(&mut session, &sql.backlog).await?;
        let processed = bounded(&mut session, &sql.processed_count).await?;
        let oldest = session.row(sql.oldest.query()).await?;
        let holds = session.row(sql.hold_counts.query()).await?;
        let counts = session.row(sql.counts.query().bind(COUNTED)).await?;
        let (leases, relays) = owners(&mut session, sql, DURING).await?;
        session.finish().await?;
        Ok(Stats {
            backlog,
            oldest_age: span(&oldest, 0).during(DURING)?,
            retrying: count(&holds, 0).during(DURING)?,
            parked: count(&holds, 1).during(DURING)?,
            dead: count(&counts, 0).during(DURING)?,
            scheduled: count(&counts, 1).during(DURING)?,
            processed,
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

    /// None: polling costs the server nothing by comparison, and a notification would cost each producer a lock.
    fn wake_up(&self) -> Option<Box<dyn WakeUp>> {
        None
    }
}

impl fmt::Debug for PostgresStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresStore")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

const fn owned(shard: Shard, epoch: i64) -> OwnedShard {
    OwnedShard {
        shard,
        epoch: Epoch(epoch),
    }
}

/// Shards and their epochs as arrays.
pub(crate) fn epochs(shards: &[OwnedShard]) -> (Vec<i16>, Vec<i64>) {
    shards
        .iter()
        .map(|owned| (small(owned.shard), owned.epoch.0))
        .unzip()
}

/// A statement whose first parameters are the fence.
fn fenced<'q>(statement: &Statement, settlement: &Settlement) -> Query<'q, Postgres, PgArguments> {
    let (shards, epochs): (Vec<i16>, Vec<i64>) = settlement
        .shards
        .iter()
        .map(|part| (small(part.shard), part.epoch.0))
        .unzip();
    statement
        .query()
        .bind(shards)
        .bind(epochs)
        .bind(settlement.relay.as_str().to_owned())
}

/// The first column of rows, as shards.
pub(crate) fn shards(rows: &[PgRow]) -> Result<Vec<Shard>> {
    rows.iter().map(|row| shard(row, 0).during("settle")).collect()
}

/// Binds delivered records as arrays.
fn bind_deliveries<'q>(
    query: Query<'q, Postgres, PgArguments>,
    settlement: &Settlement,
) -> Query<'q, Postgres, PgArguments> {
    let most = settlement.shards.iter().map(|part| part.delivered.len()).sum();
    let (mut shards, mut positions, mut ids) = (
        Vec::<i16>::with_capacity(most),
        Vec::<i64>::with_capacity(most),
        Vec::<Uuid>::with_capacity(most),
    );
    for part in &settlement.shards {
        for record in &part.delivered {
            shards.push(small(part.shard));
            positions.push(record.position.0);
            ids.push(record.id.as_uuid());
        }
    }
    query.bind(shards).bind(positions).bind(ids)
}

/// How far large tables are counted.
const COUNTED: i64 = 100_000;

async fn bounded(session: &mut Session, statement: &Statement) -> Result<Count> {
    let row = session.row(statement.query().bind(COUNTED)).await?;
    let rows = number(&row, 0).during("stats")?;
    Ok(Count::up_to(COUNTED.unsigned_abs(), rows.unsigned_abs()))
}

/// Who owns what, and who is alive.
pub(crate) async fn owners(
    session: &mut Session,
    sql: &Sql,
    operation: &'static str,
) -> Result<(Vec<LeaseStatus>, Vec<RelayId>)> {
    let leases = session.rows(sql.leases.query()).await?;
    let relays = session.rows(sql.relays.query()).await?;
    let name = |row: &PgRow| Ok(RelayId::new(text(row, 0)?.unwrap_or_default()));
    Ok((
        leases
            .iter()
            .map(lease_status)
            .collect::<sqlx::Result<_>>()
            .during(operation)?,
        relays
            .iter()
            .map(name)
            .collect::<sqlx::Result<_>>()
            .during(operation)?,
    ))
}

fn lease_status(row: &PgRow) -> sqlx::Result<LeaseStatus> {
    let time_left = optional_number(row, 3)?.unwrap_or_default().max(0).unsigned_abs();
    Ok(LeaseStatus {
        shard: shard(row, 0)?,
        epoch: Epoch(number(row, 1)?),
        owner: text(row, 2)?.filter(|_| time_left > 0).map(RelayId::new),
        time_left: Duration::from_millis(time_left),
    })
}
