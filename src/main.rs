//! The daemon: arguments, EAL, cores, control socket, signals, and the order of exit.

use std::io::IsTerminal;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Parser;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::Timespec;
use signal_hook::consts::{SIGINT, SIGTERM};
use tracing::{error, info};
use virtio_forwarder::config::{Args, Config};
use virtio_forwarder::control::{self, DaemonInfo, Event, Ports, Server, Threads};
use virtio_forwarder::relay::{IdlePolicy, Poller, Watchdog};
use virtio_forwarder::{Error, Result, guest};

/// How often cores are looked at for notifications that do not end, and how long one may take.
const WATCH: Timespec = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
const NOTIFICATION_LIMIT: Duration = Duration::from_millis(10);

fn main() -> ExitCode {
    let config = match Config::new(Args::parse()) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("virtio-forwarder: {error}");
            return ExitCode::from(2);
        }
    };
    tracing_subscriber::fmt()
        .with_env_filter(&config.log)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
    match run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!(%error, "virtio-forwarder ends");
            ExitCode::FAILURE
        }
    }
}

fn run(config: Config) -> Result<()> {
    let started = Instant::now();
    // Before anything listens, so that no signal finds the default action.
    let (signalled, signal) = UnixStream::pair().map_err(Error::io("cannot create the signal pipe"))?;
    for number in [SIGTERM, SIGINT] {
        let signal = signal.try_clone().map_err(Error::io("cannot create the signal pipe"))?;
        signal_hook::low_level::pipe::register(number, signal).map_err(Error::io("cannot catch signals"))?;
    }
    guest::install_sigbus_handler();

    // What fails most often, before anything that takes time or a core. Who connects now waits for the server.
    let socket = config.control_socket.listen()?;

    #[cfg(feature = "dpdk")]
    let eal = Arc::new(virtio_forwarder::vf::eal::Eal::start(&eal_config(&config))?);
    #[cfg(feature = "dpdk")]
    let enter = {
        let eal = eal.clone();
        move || eal.register_thread()
    };
    #[cfg(not(feature = "dpdk"))]
    let enter = || Ok(());

    let policy = if config.poll { IdlePolicy::Poll } else { IdlePolicy::Adaptive };
    #[allow(clippy::clone_on_copy)] // without DPDK, `enter` holds nothing
    let pollers =
        config.cores.iter().map(|&cpu| Poller::start(cpu, policy, enter.clone())).collect::<Result<Vec<_>>>()?;
    let pollers = Arc::new(pollers);

    let (events, inbox) = control::Inbox::new()?;
    let threads = Threads::start(pollers.clone(), events.clone(), enter)?;
    let info = DaemonInfo {
        #[cfg(feature = "dpdk")]
        dpdk_version: Some(eal.version()),
        #[cfg(feature = "dpdk")]
        max_ethdevs: Some(eal.max_ethdevs()),
        #[cfg(not(feature = "dpdk"))]
        dpdk_version: None,
        #[cfg(not(feature = "dpdk"))]
        max_ethdevs: None,
        cpus: config.cores.clone(),
        poll: config.poll,
        started,
    };
    let ports = Ports::new(threads, config.policy, config.socket_defaults, info);
    let server = Server::new(socket, inbox, ports);
    let server = std::thread::Builder::new()
        .name("control".into())
        .spawn(move || server.run())
        .map_err(Error::io("cannot start the control thread"))?;
    info!(socket = %config.control_socket.path.display(), cores = ?config.cores, "ready");

    let mut watchdog = Watchdog::new(NOTIFICATION_LIMIT);
    let mut signalled_fd = [PollFd::new(&signalled, PollFlags::IN)];
    while !server.is_finished() {
        if matches!(poll(&mut signalled_fd, Some(&WATCH)), Ok(1..)) {
            info!("ending");
            events.send(Event::Stop);
            break;
        }
        watchdog.look(&pollers, Instant::now());
    }
    // The watchdog stays on duty: a core stuck in a notification would keep its lanes.
    while !server.is_finished() {
        std::thread::sleep(Duration::from_millis(1));
        watchdog.look(&pollers, Instant::now());
    }
    let ended = server.join().expect("the control thread does not panic");
    // Ports and their lanes are gone then, and the cores end. Not if a thread was left behind: a port's keeps the
    // cores, and they its lanes.
    drop(pollers);
    #[cfg(feature = "dpdk")]
    if !eal.end() {
        if let Err(error) = &ended {
            error!(%error, "virtio-forwarder ends");
        }
        // At once: DPDK is in use.
        signal_hook::low_level::exit(ended.is_err().into());
    }
    ended
}

#[cfg(feature = "dpdk")]
fn eal_config(config: &Config) -> virtio_forwarder::vf::eal::EalConfig {
    virtio_forwarder::vf::eal::EalConfig {
        no_huge: config.no_huge,
        no_huge_mib: config.memory,
        extra: config.eal_args.clone(),
    }
}
