//! What the server tells of its transactions.

/// The number of a transaction, 64 bits without wrap-around.
pub(crate) type Xid = u64;

/// Which transactions a snapshot sees: all below `xmin`; none from `xmax` on; of those between, all but `running`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Snapshot {
    pub(crate) xmin: Xid,
    pub(crate) xmax: Xid,
    pub(crate) running: Vec<Xid>,
}

impl Snapshot {
    /// As the server writes it: `xmin:xmax:running,…`.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split(':');
        let (xmin, xmax) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
        let running = match parts.next()? {
            "" => Vec::new(),
            list => list.split(',').map(str::parse).collect::<Result<_, _>>().ok()?,
        };
        Some(Self { xmin, xmax, running })
    }

    pub(super) fn sees(&self, xid: Xid) -> bool {
        xid < self.xmin || (xid < self.xmax && !self.running.contains(&xid))
    }
}

/// What the server told with a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Server {
    pub(crate) snapshot: Snapshot,
    /// The last position that was drawn.
    pub(crate) last: i64,
    /// How far the next transaction number is from the snapshot's `xmax`, read after `last`.
    pub(crate) ahead: u64,
}
