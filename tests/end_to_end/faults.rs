//! One fault after the other, each on a stage of its own: relays and a writer, the fault in the middle, then all heals and
//! the oracle judges. What comes of it is a table.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "clippy takes only #[test] functions for tests"
)]

use std::cell::OnceCell;
use std::panic::AssertUnwindSafe;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::proof::oracle::Limits;
use crate::proof::writer::Load;
use crate::scenarios::short_lease;
use crate::stage::database::{Database, Killable};
use crate::stage::kafka::broker;
use crate::stage::relay::Relay;
use crate::stage::services::OwnServer;
use crate::stage::{Props, Relays, Stage, WINDOW, clocks, disk, from_environment, say, until};
use crate::table::{Row, millis};

const SECOND: Duration = Duration::from_secs(1);

/// Something that goes wrong.
pub(crate) struct Fault<D: Database + 'static> {
    name: String,
    relays: Relays,
    props: Props,
    /// What the writer does otherwise.
    load: fn(Load) -> Load,
    /// The broker, where it is not the shared one.
    broker: Option<Rc<Broker>>,
    inject: Injection<D>,
}

/// What makes it go wrong, and sees to it that all works again.
type Injection<D> = Box<dyn Fn(&mut Trial<'_, D>)>;

/// A fault's stage, with relays that work.
pub(crate) struct Trial<'s, D: Database> {
    stage: &'s Stage<D>,
    relays: Vec<Relay>,
    /// Counts what has arrived. It knows the broker from before the fault.
    arrivals: Box<dyn Fn() -> i64>,
    /// How often a key may go back, beside the times that a relay began to work on its shard.
    rewinds: usize,
    /// How long it took from the moment at which all worked again until something arrived.
    recovery: Option<Duration>,
    /// How long it took from an owner's death until others owned all that it had.
    take_over: Option<Duration>,
    /// How many relays were killed.
    kills: usize,
}

impl<D: Database + 'static> Fault<D> {
    fn new(name: impl Into<String>, inject: impl Fn(&mut Trial<'_, D>) + 'static) -> Self {
        Self {
            name: name.into(),
            relays: short_lease::<D>(),
            props: Props::default(),
            load: |load| load,
            broker: None,
            inject: Box::new(inject),
        }
    }

    fn with(mut self, change: impl FnOnce(&mut Relays)) -> Self {
        change(&mut self.relays);
        self
    }

    fn props(mut self, props: Props) -> Self {
        self.props = props;
        self
    }

    fn load(mut self, load: fn(Load) -> Load) -> Self {
        self.load = load;
        self
    }
}

impl<D: Database + 'static> Trial<'_, D> {
    /// The lease of the relays.
    fn lease() -> Duration {
        short_lease::<D>().lease
    }

    /// Which relay owns most of the outbox.
    fn owner(&self) -> usize {
        until(SECOND * 30, || self.stage.owner(&self.relays))
            .unwrap_or_else(|| panic!("nobody owns anything"))
    }

    fn start(&mut self) {
        self.relays.push(self.stage.relay());
    }

    fn kill(&mut self, relay: usize) {
        self.relays.swap_remove(relay).kill();
        self.kills += 1;
    }

    /// Only one relay, with this in `FAILPOINTS`.
    fn only(&mut self, failpoints: &str) {
        while let Some(relay) = self.relays.pop() {
            let _ = relay.terminate();
        }
        self.relays.push(self.stage.relay_with(failpoints));
    }

    /// Somebody has died: notes how long it takes until those that live own everything.
    fn is_taken_over(&mut self) {
        let begin = Instant::now();
        let owned = || self.stage.owned(&self.relays).into_iter().sum::<usize>();
        let all = || (owned() == self.stage.shards()).then(|| begin.elapsed());
        self.take_over = until(SECOND * 60, all);
        assert!(self.take_over.is_some(), "nobody takes over");
    }

    /// From now on all works again: notes how long it takes until something arrives, or nothing waits.
    fn heals(&mut self) {
        let (begin, before) = (Instant::now(), (self.arrivals)());
        let arrives = || {
            let works = (self.arrivals)() > before || self.stage.backlog() == 0;
            works.then(|| begin.elapsed())
        };
        // MySQL looks only once a minute whether a disk has room again.
        self.recovery = until(SECOND * 120, arrives);
        assert!(self.recovery.is_some(), "nothing arrives any more");
    }

    /// The topic is there from now on.
    fn makes_topic(&mut self) {
        self.stage.make_topic(None);
        self.arrivals = Box::new(self.stage.arrivals());
    }
}

/// The edges between two steps of a relay, with how often each is passed before, and whether only a relay that ends passes it.
const EDGES: [(&str, usize, bool); 9] = [
    ("leased", 4, false),
    ("fetched", 0, false),
    ("publishing", 0, false),
    ("handed-over", 0, false),
    ("acknowledged", 0, false),
    ("settling", 0, false),
    ("settled", 0, false),
    ("releasing", 0, true),
    ("released", 0, true),
];

fn die_at<D: Database + 'static>(trial: &mut Trial<'_, D>, edge: &str, passes: usize, ends: bool) {
    // It has to own something, so nobody else may.
    trial.only(&match passes {
        0 => format!("{edge}=return"),
        passes => format!("{edge}={passes}*off->return"),
    });
    if ends {
        trial.owner();
        std::thread::sleep(SECOND / 2);
        trial.relays[0].tell_to_end();
    }
    trial.relays.swap_remove(0).dies();
    trial.start();
    trial.heals();
}

/// What goes wrong with relays, and what they are told to be.
pub(crate) fn of_relays<D: Database + 'static>() -> Vec<Fault<D>> {
    let mut faults = vec![
        Fault::new("the owner is killed", |trial: &mut Trial<'_, D>| {
            trial.kill(trial.owner());
            trial.is_taken_over();
            trial.start();
        }),
        Fault::new("a relay is killed every second", |trial: &mut Trial<'_, D>| {
            for _ in 0..kills() {
                std::thread::sleep((SECOND * D::SLOW).mul_f64(0.5 + fastrand::f64()));
                trial.relays.iter_mut().for_each(Relay::assert_alive);
                let owner = trial
                    .stage
                    .owner(&trial.relays)
                    .filter(|_| fastrand::u8(0..3) > 0);
                trial.kill(owner.unwrap_or_else(|| fastrand::usize(0..trial.relays.len())));
                trial.start();
            }
        })
        .load(|load| Load {
            messages: kills() * MESSAGES_A_KILL / D::FEWER as usize,
            spread: SECOND * D::SLOW * u32::try_from(kills()).unwrap(),
            ..load
        }),
        Fault::new("all relays are killed", |trial| {
            while !trial.relays.is_empty() {
                trial.kill(0);
            }
            trial.start();
            trial.heals();
        }),
        Fault::new("relays are killed as they start", |trial| {
            for _ in 0..3 {
                let relay = trial.stage.relay();
                std::thread::sleep(Duration::from_millis(fastrand::u64(20..200)));
                relay.kill();
            }
        }),
        Fault::new("the owner stands still beyond its lease", |trial| {
            let owner = trial.owner();
            trial.relays[owner].pause();
            std::thread::sleep(Trial::<D>::lease() * 3);
            trial.relays[owner].resume();
            trial.rewinds += WINDOW;
        }),
        Fault::new("the owner stands still for a moment", |trial| {
            let owner = trial.owner();
            trial.relays[owner].pause();
            std::thread::sleep(Trial::<D>::lease() / 3);
            trial.relays[owner].resume();
            trial.rewinds += WINDOW;
        }),
        Fault::new("all relays stand still beyond their leases", |trial| {
            trial.relays.iter().for_each(Relay::pause);
            std::thread::sleep(Trial::<D>::lease() * 3);
            trial.relays.iter().for_each(Relay::resume);
            trial.heals();
            trial.rewinds += WINDOW;
        }),
        Fault::new("the owner is told to end", |trial| {
            let owner = trial.owner();
            let (status, _) = trial.relays.swap_remove(owner).terminate();
            assert!(status.success(), "{status}");
            trial.start();
        }),
        Fault::new("the owner is told to end twice", |trial| {
            let owner = trial.relays.swap_remove(trial.owner());
            owner.tell_to_end();
            owner.tell_to_end();
            let _ = owner.terminate();
            trial.start();
        }),
        Fault::new("ever more relays come", |trial| {
            for _ in 0..4 {
                trial.start();
            }
        }),
        Fault::new("one message at a time", |_| {}).with(|relays| relays.window = 1),
        Fault::new(
            "the locks of the database are held for longer than the lease",
            |trial: &mut Trial<'_, D>| {
                let lease = Trial::<D>::lease();
                trial
                    .stage
                    .database
                    .hold_settlements(|| std::thread::sleep(lease * 3));
                trial.heals();
                trial.rewinds += WINDOW;
            },
        ),
        Fault::new("transactions stay open for seconds", |_| {}).load(|load| Load {
            hold: SECOND * 5,
            hold_each: 100,
            ..load
        }),
        Fault::new("the producer's queue is full", |_| {})
            .with(|relays| relays.sink = "[sink.options]\n\"queue.buffering.max.messages\" = \"20\""),
    ];
    if cfg!(feature = "failpoints") {
        faults.extend(EDGES.map(|(edge, passes, ends)| {
            Fault::new(
                format!("a relay dies at the edge {edge}"),
                move |trial: &mut Trial<'_, D>| die_at(trial, edge, passes, ends),
            )
        }));
        faults.push(Fault::new("the producer breaks", |trial: &mut Trial<'_, D>| {
            trial.only("producer=5*off->1*return->off");
            let breaks = || {
                trial.relays[0]
                    .log()
                    .contains("the sink cannot be used")
                    .then_some(())
            };
            assert!(until(SECOND * 30, breaks).is_some(), "it does not break");
            trial.heals();
            trial.rewinds += 1;
        }));
    } else {
        say("relays have edges at which they die with the feature failpoints only");
    }
    if clocks::can_be_set() {
        faults.extend(
            [("an hour and a half ahead", 5_400), ("a day behind", -86_400)].map(|(by, seconds)| {
                let fault = Fault::new(
                    format!("the relays' clocks are {by}"),
                    move |trial: &mut Trial<'_, D>| {
                        trial.stage.clocks().set_by(seconds);
                        std::thread::sleep(SECOND * 3);
                        trial.stage.clocks().set_by(0);
                        // They see it within a second.
                        std::thread::sleep(SECOND);
                        trial.heals();
                        trial.rewinds += 1;
                    },
                );
                fault.props(Props {
                    clocks: true,
                    ..Props::default()
                })
            }),
        );
    } else {
        say("clocks cannot be wrong here: faketime is not installed");
    }
    faults
}

/// How often relays are killed where they are killed again and again.
fn kills() -> usize {
    from_environment("OUTBOX_FAULTS_KILLS", 5)
}

/// How many messages are written meanwhile, for each kill, where the server is not slow.
const MESSAGES_A_KILL: usize = 500;

/// What goes wrong with messages and their topic.
pub(crate) fn of_the_topic<D: Database + 'static>() -> Vec<Fault<D>> {
    vec![
        Fault::new(
            "one message of a hundred is refused",
            |trial: &mut Trial<'_, D>| {
                // Each refusal makes the producer start anew.
                trial.rewinds += WINDOW;
            },
        )
        .props(Props {
            narrow: true,
            ..Props::default()
        })
        .load(|load| Load {
            poison_each: 100,
            ..load
        }),
        Fault::new("the topic is not there", |trial| {
            std::thread::sleep(SECOND * 3);
            trial.makes_topic();
            trial.heals();
        })
        .props(Props {
            topic_later: true,
            ..Props::default()
        }),
        Fault::new("the topic is forbidden", |trial| {
            std::thread::sleep(SECOND * 3);
            trial.stage.grant_topic();
            trial.heals();
        })
        .with(|relays| relays.login = true),
    ]
}

/// What goes wrong between relays and their database.
pub(crate) fn of_the_network<D: Database + 'static>() -> Vec<Fault<D>> {
    let faults = vec![
        Fault::new("relays have two connections", |_: &mut Trial<'_, D>| {})
            .with(|relays| relays.store = "max_connections = 2"),
        Fault::new("connections are cut", |trial: &mut Trial<'_, D>| {
            for _ in 0..3 {
                trial.stage.network().cut();
                std::thread::sleep(SECOND / 2);
            }
        }),
        Fault::new("nothing passes for longer than the lease", |trial| {
            trial.stage.network().blackhole(true);
            std::thread::sleep(Trial::<D>::lease() * 3);
            trial.stage.network().blackhole(false);
            trial.heals();
        }),
        Fault::new("connections are lost, and nobody is told", |trial| {
            trial.stage.network().lose();
            trial.heals();
            // At last the server is told as well.
            trial.stage.network().cut();
        }),
        Fault::new("every answer takes 50 ms", |trial| {
            trial.stage.network().delay(Duration::from_millis(25));
            std::thread::sleep(SECOND * 2);
            trial.stage.network().delay(Duration::ZERO);
        }),
        Fault::new("connections are cut when a request has arrived", |trial| {
            for _ in 0..10 {
                trial.stage.network().cut_at(fastrand::usize(1..20), true);
                std::thread::sleep(SECOND / 4);
            }
            trial.stage.network().disarm();
        }),
        Fault::new("connections are cut before a request arrives", |trial| {
            for _ in 0..10 {
                trial.stage.network().cut_at(fastrand::usize(1..20), false);
                std::thread::sleep(SECOND / 4);
            }
            trial.stage.network().disarm();
        }),
        Fault::new("connections are cut right after a commit", |trial| {
            for _ in 0..10 {
                trial.stage.network().cut_after(D::COMMIT);
                std::thread::sleep(SECOND / 4);
            }
            trial.stage.network().disarm();
            assert!(trial.stage.network().cuts() > 0, "no commit passed");
        }),
        Fault::new("connections are cut within an answer", |trial| {
            for _ in 0..10 {
                trial.stage.network().cut_back_after(fastrand::usize(1..20_000));
                std::thread::sleep(SECOND / 4);
            }
            trial.stage.network().disarm();
        }),
    ];
    let through = |fault: Fault<D>| {
        fault.props(Props {
            network: true,
            ..Props::default()
        })
    };
    faults.into_iter().map(through).collect()
}

/// A broker of a test's own, started when it is wanted, and gone with the faults.
#[derive(Default)]
struct Broker {
    server: OnceCell<(OwnServer, TempDir)>,
}

impl Broker {
    fn server(&self) -> &OwnServer {
        let (server, _) = self.server.get_or_init(|| {
            let folder = tempfile::tempdir().unwrap();
            (OwnServer::start("kafka", folder.path()), folder)
        });
        server
    }
}

/// What goes wrong with the broker: one of the test's own.
pub(crate) fn of_the_broker<D: Database + 'static>() -> Vec<Fault<D>> {
    let broker = Rc::new(Broker::default());
    let fault = |name: &str, inject: fn(&Broker, &mut Trial<'_, D>)| {
        let own = Rc::clone(&broker);
        let mut fault = Fault::new(name, move |trial: &mut Trial<'_, D>| {
            inject(&own, trial);
            trial.heals();
            trial.rewinds += 1;
        });
        fault.broker = Some(Rc::clone(&broker));
        fault
    };
    vec![
        fault("the broker is killed", |own, _| {
            own.server().signal("KILL");
            own.server().restart();
        }),
        fault("the broker is away for five seconds", |own, _| {
            own.server().signal("KILL");
            std::thread::sleep(SECOND * 5);
            own.server().restart();
        }),
        fault("the broker stands still", |own, _| {
            own.server().signal("STOP");
            std::thread::sleep(SECOND * 5);
            own.server().signal("CONT");
        }),
    ]
}

/// What goes wrong with the disk that the database is on, of so many MiB. Where a server dies of it, it is started again.
pub(crate) fn of_the_disk<D: Database + 'static>(size: u32, starts: impl Fn(&D) + 'static) -> Vec<Fault<D>> {
    if !disk::can_be_mounted() {
        say("no small disk can be mounted here: that takes an administrator on Linux");
        return Vec::new();
    }
    let fault = Fault::new("the disk is full", move |trial: &mut Trial<'_, D>| {
        for _ in 0..12 {
            trial.stage.disk().fill();
            std::thread::sleep(SECOND / 4);
        }
        trial.stage.disk().free();
        starts(&trial.stage.database);
        trial.heals();
        trial.rewinds += WINDOW;
    });
    vec![fault.props(Props {
        disk: Some(size),
        ..Props::default()
    })]
}

/// What goes wrong with the database: a server of the test's own.
pub(crate) fn of_the_server<D: Killable + 'static>() -> Vec<Fault<D>> {
    vec![
        Fault::new("the database is killed", |trial: &mut Trial<'_, D>| {
            trial.stage.database.kill();
            trial.stage.database.restart();
            trial.heals();
            trial.rewinds += 1;
        }),
        Fault::new(
            "the database is killed, again and again",
            |trial: &mut Trial<'_, D>| {
                for _ in 0..3 {
                    trial.stage.database.kill();
                    std::thread::sleep(SECOND.mul_f64(fastrand::f64()));
                    trial.stage.database.restart();
                    trial.rewinds += 1;
                }
                trial.heals();
            },
        ),
    ]
}

/// Tries all of these that are wanted, one after the other. They are tried on the stores `among` which this one is.
pub(crate) fn try_all<D: Database + 'static>(
    store: &str,
    among: &[&str],
    faults: Vec<Fault<D>>,
    rows: &mut Vec<Row>,
) {
    let place = among.iter().position(|own| *own == store).unwrap();
    for (number, fault) in faults.into_iter().enumerate() {
        let wanted = std::env::var("OUTBOX_FAULTS").map_or_else(
            // A part of them on each store, and each on one store at least.
            |_| number % among.len() == place,
            |names| names.split(',').any(|part| fault.name.contains(part.trim())),
        );
        if wanted {
            let begin = Instant::now();
            let tried = std::panic::catch_unwind(AssertUnwindSafe(|| attempt(store, &fault)));
            let row = tried.unwrap_or_else(|_| Row::broken(store, &fault.name, begin.elapsed()));
            say(&row.line());
            rows.push(row);
        }
    }
}

fn attempt<D: Database + 'static>(store: &str, fault: &Fault<D>) -> Row {
    let begin = Instant::now();
    let servers = fault
        .broker
        .as_ref()
        .map_or_else(broker, |own| own.server().variable(""));
    let stage = Stage::<D>::with(&servers, fault.relays, fault.props);
    let mut trial = Trial {
        stage: &stage,
        relays: (0..2).map(|_| stage.relay()).collect(),
        arrivals: Box::new(stage.arrivals()),
        rewinds: 0,
        recovery: None,
        take_over: None,
        kills: 0,
    };
    std::thread::scope(|scope| {
        let load = stage.load(SECOND * 4 * D::SLOW);
        let load = (fault.load)(Load {
            messages: load.messages / 5,
            ..load
        });
        let writer = scope.spawn(|| stage.write(&{ load }));
        // The relays have begun.
        trial.owner();
        std::thread::sleep(SECOND);
        (fault.inject)(&mut trial);
        writer.join().unwrap();
    });
    stage.wait_until_drained(&mut trial.relays);
    let limits = Limits {
        rewinds: stage.beginnings() + trial.rewinds,
        repeats: WINDOW,
    };
    let (recovery, take_over, kills) = (trial.recovery, trial.take_over, trial.kills);
    let report = stage.judge(&format!("{store}: {}", fault.name), trial.relays, limits);
    Row {
        store: store.to_owned(),
        fault: fault.name.clone(),
        kept: report.broken().is_empty(),
        committed: report.committed,
        duplicates: report.duplicates,
        lost: report.lost,
        phantoms: report.phantoms,
        gaps: report.gaps,
        dead: report.dead,
        kills,
        recovery_ms: recovery.map(millis),
        take_over_ms: take_over.map(millis),
        seconds: begin.elapsed().as_secs_f64(),
    }
}
