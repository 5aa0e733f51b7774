//! A hostile front end: every row is one malformed ring or message sequence. During and after each of
//! them another port on the same core forwards packet-exactly, the attacked port serves its next guest,
//! and the daemon holds no fd, thread, mapping or port more than before.

mod addresses;
mod chains;
mod fds;
mod framing;
mod memory;
mod messages;
mod offloads;
mod packed;
mod races;
mod receive;
mod storms;
#[path = "../support/mod.rs"]
mod support;

use std::any::Any;
use std::path::PathBuf;
use std::time::Instant;

use support::daemon::{Daemon, Lanes};
use support::frontend::{FrontEnd, feature};
use support::guest::{Flows, Guest, Plan, negotiate};
use support::{PATIENCE, census};

/// What an attack wants to stay as it left it while the other port is looked at.
type Kept = Box<dyn Any>;

/// Queue pairs of the attacked port.
const PAIRS: usize = 2;

/// How often an attack is repeated for leaks to show.
const ROUNDS: usize = 3;

/// The port under attack.
struct Target<'a> {
    daemon: &'a Daemon,
    socket: PathBuf,
}

impl Target<'_> {
    /// A connection on which nothing was said yet.
    fn raw(&self) -> FrontEnd {
        FrontEnd::connect(&self.socket)
    }

    /// A connection with features negotiated, REPLY_ACK included, and nothing else.
    fn front(&self) -> FrontEnd {
        let mut front = self.raw();
        negotiate(&mut front, feature::VERSION_1 | feature::MRG_RXBUF);
        assert!(front.reply_ack, "REPLY_ACK is not offered");
        front
    }

    fn guest(&self, plan: &Plan) -> Guest {
        Guest::connect(&self.socket, plan)
    }

    fn lanes(&self) -> Lanes {
        self.daemon.lanes("target")
    }

    /// Why a ring does not run though it should.
    fn fault(&self, ring: usize) -> Option<String> {
        let show = self.daemon.show("target");
        let fault = &show["guest"]["rings"][ring]["fault"];
        fault.as_str().map(str::to_owned)
    }

    /// Waits for the ring to be stopped with a visible reason.
    #[track_caller]
    fn until_fault(&self, ring: usize) {
        let start = Instant::now();
        while self.fault(ring).is_none() {
            assert!(start.elapsed() < PATIENCE, "ring {ring} shows no fault: {}", self.daemon.show("target"));
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    }

    /// Waits until a counter has grown by exactly `n` and stays there.
    #[track_caller]
    fn until_counted(&self, what: &str, n: u64, count: impl Fn(&Lanes) -> u64) {
        let start = Instant::now();
        while count(&self.lanes()) < n && start.elapsed() < PATIENCE {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        assert_eq!(count(&self.lanes()), n, "{what}: {:?}", self.lanes());
    }
}

/// The other port on the same core.
struct Bystander {
    guest: Guest,
    flows: Flows,
}

impl Bystander {
    fn forwards(&mut self, daemon: &Daemon) {
        self.flows.exchange(&mut self.guest, &[0], 300, 1200);
        let lanes = daemon.lanes("bystander");
        let sent = self.flows.total_sent();
        for lane in [lanes.guest_to_vf, lanes.vf_to_guest] {
            assert_eq!(lane.packets, sent, "{lanes:?}");
            assert_eq!(lane.bytes, self.flows.bytes, "{lanes:?}");
            assert_eq!(lane.dropped.total(), 0, "{lanes:?}");
        }
    }
}

fn survives(attack: impl Fn(&Target<'_>) -> Kept) {
    let daemon = Daemon::start();
    let bystander = daemon.attach("bystander", "soft:loop", 1);
    let mut bystander = Bystander { guest: Guest::connect(&bystander, &Plan::default()), flows: Flows::new(4) };
    bystander.forwards(&daemon);
    let target = Target { socket: daemon.attach("target", "soft:loop", PAIRS), daemon: &daemon };
    // The first guest and the first attack may set up what stays for good (a grown table, a log line's buffer).
    drop(attack(&target));
    // A guest after it: then the attack's connection, closed perhaps before it was accepted, is history.
    serves_a_guest(&target);
    let before = daemon.census();
    let memory = || census::anonymous_kib(daemon.pid());
    census::memory_stays_level(memory, 256, || {
        for _ in 0..ROUNDS {
            let kept = attack(&target);
            bystander.forwards(&daemon);
            drop(kept);
            daemon.until_guest("target", false);
            bystander.forwards(&daemon);
        }
        daemon.until_census(&before);
    });
    serves_a_guest(&target);
    bystander.forwards(&daemon);
    assert_eq!(daemon.ports(), ["bystander", "target"]);
    drop(bystander);
    daemon.stop();
}

/// The attacked port serves a well-behaved guest as if nothing had happened.
fn serves_a_guest(target: &Target<'_>) {
    let mut guest = target.guest(&Plan::pairs(PAIRS));
    let before = target.lanes();
    let mut flows = Flows::new(8);
    flows.exchange(&mut guest, &[0, 1], 200, 1500);
    let after = target.lanes();
    assert_eq!(after.guest_to_vf.packets, before.guest_to_vf.packets + 200, "{after:?}");
    assert_eq!(after.vf_to_guest.packets, before.vf_to_guest.packets + 200, "{after:?}");
    guest.stop();
    drop(guest);
    target.daemon.until_guest("target", false);
}

/// One test per row.
macro_rules! attacks {
    ($($name:ident: $attack:expr;)+) => {$(
        #[test]
        fn $name() {
            crate::survives($attack);
        }
    )+};
}
pub(crate) use attacks;
