//! What a process holds, counted from outside through /proc.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Countable things of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Census {
    /// Open fds, by what they are, sorted: a difference names the leak.
    pub fds: Vec<String>,
    /// Names of its threads, sorted.
    pub threads: Vec<String>,
    /// Mappings of shared memory files: guest memory.
    pub guest_mappings: usize,
}

impl Census {
    pub fn of(pid: u32) -> Self {
        let mut fds: Vec<String> = fs::read_dir(format!("/proc/{pid}/fd"))
            .expect("the process runs")
            .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
            .map(|target| kind(&target.to_string_lossy()))
            .collect();
        fds.sort();
        let mut threads: Vec<String> = fs::read_dir(format!("/proc/{pid}/task"))
            .expect("the process runs")
            .filter_map(|entry| fs::read_to_string(entry.ok()?.path().join("comm")).ok())
            .map(|name| name.trim_end().to_owned())
            .collect();
        threads.sort();
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
        Self { fds, threads, guest_mappings: maps.matches("/memfd:guest").count() }
    }

    /// Threads of ports.
    pub fn port_threads(&self) -> usize {
        self.threads.iter().filter(|name| name.starts_with("port-")).count()
    }
}

/// Socket and pipe numbers change with every connection; what they are does not.
fn kind(target: &str) -> String {
    match target.split_once(":[") {
        Some((class @ ("socket" | "pipe"), _)) => class.to_owned(),
        _ => target.to_owned(),
    }
}

fn field(text: &str, name: &str) -> u64 {
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse().ok())
        .unwrap_or_else(|| panic!("no {name} in {text}"))
}

pub fn free_hugepages() -> u64 {
    field(&fs::read_to_string("/proc/meminfo").expect("meminfo"), "HugePages_Free:")
}

/// Anonymous memory of a process, in KiB: what it has allocated, without files and guest memory. Counted in its
/// page tables: the sums of `status` are off by dozens of pages per processor.
pub fn anonymous_kib(pid: u32) -> u64 {
    field(&fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("the process runs"), "Anonymous:")
}

/// Runs spans of equal work until memory stays level over one of them: a leak costs something in every span, a heap
/// that comes to be arranged differently in one or another.
#[track_caller]
pub fn memory_stays_level(measure: impl Fn() -> u64, leak_kib: u64, mut span: impl FnMut()) {
    const SPANS: usize = 4;
    let mut seen = vec![measure()];
    while seen.len() <= SPANS {
        span();
        seen.push(measure());
        if seen[seen.len() - 1] < seen[seen.len() - 2] + leak_kib {
            println!("anonymous memory after each span, in KiB: {seen:?}");
            return;
        }
    }
    panic!("memory grows by {leak_kib} KiB and more in each span: {seen:?}");
}

/// Hugepages that a process has in use, in KiB. What others do meanwhile does not count.
pub fn huge_kib(pid: u32) -> u64 {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("the process runs");
    field(&maps, "Shared_Hugetlb:") + field(&maps, "Private_Hugetlb:")
}

/// Files that EAL of this process left in a hugetlbfs: they keep their pages.
pub fn huge_files(pid: u32) -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").expect("mounts");
    let fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let places = fields.filter(|fields| fields[2] == "hugetlbfs").map(|fields| fields[1].to_owned());
    let files = places.filter_map(|place| fs::read_dir(place).ok()).flatten().flatten().map(|entry| entry.path());
    let prefix = format!("virtio-forwarder-{pid}");
    files.filter(|file| file.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&prefix))).collect()
}

/// Processor time a process has used, all threads.
pub fn cpu_time(pid: u32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("the process runs");
    // The command's name may hold anything; the fields are counted from its closing bracket.
    let fields = stat.rsplit_once(')').expect("a name in brackets").1;
    let ticks = |i: usize| -> u64 {
        let text = fields.split_whitespace().nth(i).expect("stat field");
        text.parse().expect("a number")
    };
    // USER_HZ, the unit of /proc, is 100 on every Linux we run on.
    Duration::from_millis(10 * (ticks(11) + ticks(12)))
}

/// Share of one core that a process used over `span`, in percent.
pub fn cpu_percent(pid: u32, span: Duration) -> f64 {
    let (start, before) = (Instant::now(), cpu_time(pid));
    std::thread::sleep(span);
    (cpu_time(pid) - before).as_secs_f64() * 100.0 / start.elapsed().as_secs_f64()
}
