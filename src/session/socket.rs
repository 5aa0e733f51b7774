//! Socket files and connections.
//!
//! The daemon may run as root and be told socket paths by others, so a server socket is made relative
//! to an opened directory, under a hidden name, and gets the name asked for only when its owner and
//! mode are final and it listens. Nothing that is alive or foreign is ever removed.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, RenameFlags, ResolveFlags, Stat, Uid, chmod, chownat, fchmod,
    fstat, openat, openat2, renameat_with, statat, unlinkat,
};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, acceptfrom_with, bind, connect, listen, socket_with,
};

use super::port::SocketPlan;
use crate::error::{Error, Result};

/// Longest path that fits into a socket address, without its terminating zero.
pub(crate) const MAX_PATH: usize = 107;

/// Connections that may wait; one is served at a time.
const BACKLOG: i32 = 4;

/// How hidden names begin.
const HIDDEN: &str = ".virtio-forwarder.";

/// A hidden name that is so old was left behind by a process that was killed: it has its final name at once, or goes.
const LEFT_BEHIND: Duration = Duration::from_secs(10);

/// A socket file we listen on. Dropping it removes the file, if it is still ours.
#[derive(Debug)]
pub struct ServerSocket {
    listener: UnixListener,
    place: Place,
    identity: Identity,
}

/// A name in an opened directory.
#[derive(Debug)]
struct Place {
    directory: Arc<OwnedFd>,
    name: OsString,
}

/// What tells a socket file from one that took its name. The kernel keeps the inode of a bound
/// socket alive, so the number cannot come again while we listen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    dev: u64,
    ino: u64,
}

impl Identity {
    fn of(stat: &Stat) -> Self {
        Self { dev: stat.st_dev, ino: stat.st_ino }
    }
}

impl ServerSocket {
    /// Makes the socket file and listens. When this returns, front ends can connect.
    ///
    /// # Errors
    /// [`Error::Conflict`] if the path holds a socket that somebody listens on, a socket of a stranger,
    /// or anything else than a socket; it is left as it was. [`Error::Invalid`] for a path no client
    /// could connect to. [`Error::Conflict`] too if a part of the directory's path is a symbolic link: who
    /// checked the path has resolved them. [`Error::Io`] if the directory is not there or we may not write to it or
    /// change the owner.
    pub fn bind(plan: &SocketPlan) -> Result<Self> {
        let path = &plan.path;
        let name = check_path(path)?;
        let parent = path.parent().unwrap_or(Path::new("/"));
        let directory = open_directory(parent).map_err(|errno| match errno {
            Errno::LOOP => conflict(path, "is reached through a symbolic link, which came after it was checked"),
            Errno::NOENT => failed("create the socket's directory first:", parent, errno),
            errno => failed("opening the socket directory", parent, errno),
        })?;
        let place = Place { directory: Arc::new(directory), name };
        let stale = place.stale_socket(plan)?;
        place.reap(plan);

        // From here on, dropping it removes the hidden name.
        let mut server = Self::hidden(&place, path)?;
        server.set_access(plan)?;
        listen(&server.listener, BACKLOG).map_err(|errno| failed("listening on", path, errno))?;
        server.take_name(place, stale, path)?;
        Ok(server)
    }

    /// The next connection, non-blocking; `None` if nobody is waiting.
    pub fn accept(&self) -> Result<Option<UnixStream>> {
        match acceptfrom_with(&self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok((stream, _)) => Ok(Some(stream.into())),
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => Ok(None),
            Err(errno) => Err(Error::io("accepting a front end")(errno.into())),
        }
    }

    /// Binds under a hidden name in the directory of `place`; nobody can connect yet.
    fn hidden(place: &Place, path: &Path) -> Result<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let socket = stream_socket()?;
        // A socket file takes the mode of its socket: nobody can connect until we say so.
        fchmod(&socket, Mode::empty()).map_err(|errno| failed("chmod of", path, errno))?;
        loop {
            let count = COUNT.fetch_add(1, Ordering::Relaxed);
            let name = format!("{HIDDEN}{:x}.{count:x}", std::process::id());
            match bind(&socket, &proc_entry(&place.directory, &name)?) {
                Ok(()) => {
                    let place = Place { directory: place.directory.clone(), name: name.into() };
                    let stat = place.stat().map_err(|errno| failed("stat of", path, errno))?;
                    return Ok(Self { listener: socket.into(), identity: Identity::of(&stat), place });
                }
                // Left behind by a killed process with our number.
                Err(Errno::ADDRINUSE) => {}
                Err(errno) => return Err(failed("binding a socket beside", path, errno)),
            }
        }
    }

    /// Sets owner, group and mode of the socket file; path and role of `plan` are those it has.
    /// Works on the file, not on its name, so no link can be put in its way.
    pub fn set_access(&self, plan: &SocketPlan) -> Result<()> {
        let Place { directory, name } = &self.place;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file =
            openat(directory, name, flags, Mode::empty()).map_err(|errno| failed("opening", &plan.path, errno))?;
        let stat = fstat(&file).map_err(|errno| failed("stat of", &plan.path, errno))?;
        if Identity::of(&stat) != self.identity {
            return Err(conflict(&plan.path, "is being replaced by somebody else"));
        }
        if plan.uid.is_some() || plan.gid.is_some() {
            let (uid, gid) = (plan.uid.map(Uid::from_raw), plan.gid.map(Gid::from_raw));
            chownat(&file, "", uid, gid, AtFlags::EMPTY_PATH)
                .map_err(|errno| failed("changing the owner of", &plan.path, errno))?;
        }
        // An O_PATH fd takes no fchmod; its entry in /proc leads to the same inode.
        let entry = format!("/proc/self/fd/{}", file.as_raw_fd());
        chmod(entry, Mode::from_raw_mode(plan.mode & 0o777)).map_err(|errno| failed("chmod of", &plan.path, errno))
    }

    /// Moves from the hidden name to `place`, which must be free, or hold still the stale socket.
    fn take_name(&mut self, place: Place, stale: Option<Identity>, path: &Path) -> Result<()> {
        let directory = self.place.directory.clone();
        let (hidden, name) = (&self.place.name, &place.name);
        let flags = match stale {
            Some(_) => RenameFlags::EXCHANGE,
            None => RenameFlags::NOREPLACE,
        };
        match renameat_with(&directory, hidden, &directory, name, flags) {
            Ok(()) => {}
            Err(Errno::EXIST) => return Err(conflict(path, "was created by somebody else just now")),
            Err(errno) => return Err(failed("renaming a socket to", path, errno)),
        }
        let hidden = std::mem::replace(&mut self.place, place);
        let Some(stale) = stale else { return Ok(()) };
        // What we exchanged with now has the hidden name.
        if hidden.stat().is_ok_and(|stat| Identity::of(&stat) == stale) {
            return unlinkat(&directory, &hidden.name, AtFlags::empty())
                .map_err(|errno| failed("removing the stale socket", path, errno));
        }
        let (back, name) = (&hidden.name, &self.place.name);
        renameat_with(&directory, back, &directory, name, RenameFlags::EXCHANGE)
            .map_err(|errno| failed("giving back the name", path, errno))?;
        self.place = hidden;
        Err(conflict(path, "was replaced by somebody else just now"))
    }
}

impl AsFd for ServerSocket {
    /// Readable when a front end waits.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for ServerSocket {
    fn drop(&mut self) {
        let Place { directory, name } = &self.place;
        if self.place.stat().is_ok_and(|stat| Identity::of(&stat) == self.identity) {
            // Nobody is there to hear of a failure; the file is then a stale one of ours.
            let _ = unlinkat(directory, name, AtFlags::empty());
        }
    }
}

impl Place {
    fn stat(&self) -> Result<Stat, Errno> {
        statat(&self.directory, &self.name, AtFlags::SYMLINK_NOFOLLOW)
    }

    /// What is at this place: nothing, or a socket that may be replaced: nobody listens on it and it
    /// belongs to us or to the owner this port gives its sockets.
    fn stale_socket(&self, plan: &SocketPlan) -> Result<Option<Identity>> {
        let path = &plan.path;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = match openat(&self.directory, &self.name, flags, Mode::empty()) {
            Ok(file) => file,
            Err(Errno::NOENT) => return Ok(None),
            Err(errno) => return Err(failed("opening", path, errno)),
        };
        let stat = fstat(&file).map_err(|errno| failed("stat of", path, errno))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
            return Err(conflict(path, "exists and is no socket"));
        }
        let ours = rustix::process::geteuid().as_raw();
        if stat.st_uid != ours && Some(stat.st_uid) != plan.uid {
            let why = format!("is a socket of user {}", stat.st_uid);
            return Err(conflict(path, &why));
        }
        // Through the fd: what is asked is what was looked at.
        match connect(stream_socket()?, &proc_entry(&file, "")?) {
            Err(Errno::CONNREFUSED) => Ok(Some(Identity::of(&stat))),
            _ => Err(conflict(path, "is in use by another process or port")),
        }
    }
}

impl Place {
    /// Removes the hidden names beside this place that killed processes left behind. Best effort: they only litter.
    fn reap(&self, plan: &SocketPlan) {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let Ok(entries) = openat(&self.directory, ".", flags, Mode::empty()).and_then(Dir::new) else { return };
        for entry in entries.flatten() {
            let name = entry.file_name().to_bytes();
            if name.starts_with(HIDDEN.as_bytes()) {
                let hidden = Self { directory: self.directory.clone(), name: OsStr::from_bytes(name).to_owned() };
                if hidden.is_left_behind(plan) {
                    let _ = unlinkat(&hidden.directory, &hidden.name, AtFlags::empty());
                }
            }
        }
    }

    fn is_left_behind(&self, plan: &SocketPlan) -> bool {
        let Ok(stat) = self.stat() else { return false };
        let made = SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(stat.st_mtime).unwrap_or(0));
        // Between its bind and its listen nobody listens on a socket of a daemon that lives, either.
        made.elapsed().is_ok_and(|age| age > LEFT_BEHIND)
            && matches!(self.stale_socket(plan), Ok(Some(identity)) if identity == Identity::of(&stat))
    }
}

/// Opens a directory, without following links: the path was checked, and one may have come since.
fn open_directory(path: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    match openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS) {
        // Before Linux 5.6, or under a system call filter from before it.
        Err(Errno::NOSYS | Errno::PERM) => openat(CWD, path, flags, Mode::empty()),
        result => result,
    }
}

/// The socket address of what `fd` stands for, or of `name` in the directory it stands for.
fn proc_entry(fd: &OwnedFd, name: &str) -> Result<SocketAddrUnix> {
    let slash = if name.is_empty() { "" } else { "/" };
    let path = format!("/proc/self/fd/{}{slash}{name}", fd.as_raw_fd());
    SocketAddrUnix::new(path.as_str()).map_err(|errno| Error::io(format!("socket address {path}"))(errno.into()))
}

/// One attempt of a client-role port to reach its front end; never blocks. `None`: nobody listens
/// there yet; try again.
///
/// # Errors
/// [`Error::Invalid`] for a path that can never work, [`Error::Io`] for one that we may not use.
pub fn try_connect(path: &Path) -> Result<Option<UnixStream>> {
    check_path(path)?;
    let address = SocketAddrUnix::new(path)
        .map_err(|errno| Error::io(format!("socket path {}", path.display()))(errno.into()))?;
    let socket = stream_socket()?;
    match connect(&socket, &address) {
        Ok(()) => Ok(Some(socket.into())),
        Err(Errno::NOENT | Errno::CONNREFUSED | Errno::AGAIN | Errno::INTR) => Ok(None),
        Err(errno) => Err(failed("connecting to", path, errno)),
    }
}

fn stream_socket() -> Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .map_err(|errno| Error::io("creating a socket")(errno.into()))
}

/// The last part of a path that clients can connect to.
fn check_path(path: &Path) -> Result<OsString> {
    let invalid = |why: &str| Error::Invalid(format!("socket path {}: {why}", path.display()));
    if !path.is_absolute() {
        return Err(invalid("it must be absolute"));
    }
    if path.as_os_str().len() > MAX_PATH {
        return Err(invalid(&format!("it is longer than the {MAX_PATH} bytes of a socket address")));
    }
    let name = path.file_name().ok_or_else(|| invalid("it names no file"))?;
    Ok(name.to_owned())
}

fn failed(what: &str, path: &Path, errno: Errno) -> Error {
    Error::io(format!("{what} {}", path.display()))(io::Error::from(errno))
}

fn conflict(path: &Path, why: &str) -> Error {
    Error::Conflict(format!(
        "socket path {} {why}; it was not touched: remove it or choose another path",
        path.display()
    ))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};
    use std::path::PathBuf;

    use super::*;
    use crate::session::port::Role;
    use crate::session::tests::fds::no_forks;

    fn plan(path: &Path) -> SocketPlan {
        SocketPlan { path: path.to_owned(), role: Role::Server, uid: None, gid: None, mode: 0o660 }
    }

    fn scratch() -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("port.sock");
        (directory, path)
    }

    fn files(directory: &tempfile::TempDir) -> Vec<String> {
        let entries = fs::read_dir(directory.path()).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn a_server_socket_serves_and_leaves_nothing_behind() {
        let (directory, path) = scratch();
        assert!(try_connect(&path).unwrap().is_none());
        let server = ServerSocket::bind(&plan(&path)).unwrap();
        assert_eq!(files(&directory), ["port.sock"]);
        assert!(server.accept().unwrap().is_none());
        for _ in 0..3 {
            let client = try_connect(&path).unwrap().expect("somebody listens");
            let served = server.accept().unwrap().expect("somebody connects");
            assert!(rustix::fs::fcntl_getfl(&served).unwrap().contains(OFlags::NONBLOCK));
            drop((client, served));
        }
        drop(server);
        assert!(files(&directory).is_empty());
        assert!(try_connect(&path).unwrap().is_none());
    }

    #[test]
    fn owner_and_mode_are_as_asked() {
        let (_directory, path) = scratch();
        for mode in [0o600, 0o660, 0o666, 0o777, 0o000] {
            let ours = SocketPlan {
                uid: Some(rustix::process::geteuid().as_raw()),
                gid: Some(rustix::process::getegid().as_raw()),
                mode,
                ..plan(&path)
            };
            let server = ServerSocket::bind(&ours).unwrap();
            let metadata = fs::symlink_metadata(&path).unwrap();
            assert!(metadata.file_type().is_socket());
            assert_eq!(metadata.mode() & 0o7777, mode, "whatever the umask");
            assert_eq!((Some(metadata.uid()), Some(metadata.gid())), (ours.uid, ours.gid));
            drop(server);
        }
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let other = SocketPlan { uid: Some(64055), gid: Some(64056), ..plan(&path) };
        let server = ServerSocket::bind(&other).unwrap();
        let metadata = fs::symlink_metadata(&path).unwrap();
        assert_eq!((metadata.uid(), metadata.gid()), (64055, 64056));
        drop(server);
        assert!(!path.exists());
    }

    /// Root may do all of it; anybody else may not give files away, and then nothing is left.
    #[test]
    fn a_refused_owner_leaves_nothing() {
        let (directory, path) = scratch();
        let other = SocketPlan { uid: Some(1), ..plan(&path) };
        match ServerSocket::bind(&other) {
            Ok(_) => assert!(rustix::process::geteuid().is_root()),
            Err(error) => assert_eq!(error.code(), "io"),
        }
        assert!(files(&directory).is_empty());
    }

    #[test]
    fn a_stale_socket_is_replaced() {
        let _no_forks = no_forks();
        let (directory, path) = scratch();
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let server = ServerSocket::bind(&plan(&path)).unwrap();
        assert_eq!(files(&directory), ["port.sock"]);
        assert!(try_connect(&path).unwrap().is_some());
        drop(server);
        assert!(files(&directory).is_empty());
    }

    /// Of the owner this port gives its sockets: left by a killed daemon. Of somebody else: not ours.
    #[test]
    fn a_stale_socket_of_a_stranger_is_refused() {
        let _no_forks = no_forks();
        if !rustix::process::geteuid().is_root() {
            println!("skipped: only root can make a file of somebody else");
            return;
        }
        let (directory, path) = scratch();
        drop(UnixListener::bind(&path).unwrap());
        std::os::unix::fs::chown(&path, Some(64055), None).unwrap();
        assert_eq!(ServerSocket::bind(&plan(&path)).unwrap_err().code(), "conflict");
        assert_eq!(files(&directory), ["port.sock"]);
        let known = SocketPlan { uid: Some(64055), ..plan(&path) };
        assert!(ServerSocket::bind(&known).is_ok());
    }

    #[test]
    fn a_live_socket_is_refused_and_left_alone() {
        let (directory, path) = scratch();
        let live = ServerSocket::bind(&plan(&path)).unwrap();
        let error = ServerSocket::bind(&plan(&path)).unwrap_err();
        assert_eq!(error.code(), "conflict");
        assert_eq!(files(&directory), ["port.sock"]);
        // Its queue full, too.
        let waiting: Vec<_> = std::iter::from_fn(|| try_connect(&path).unwrap()).take(64).collect();
        assert!(waiting.len() < 64);
        assert_eq!(ServerSocket::bind(&plan(&path)).unwrap_err().code(), "conflict");
        drop(waiting);
        drop(live);
        // A datagram socket is alive in its own way.
        let _other = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
        assert_eq!(ServerSocket::bind(&plan(&path)).unwrap_err().code(), "conflict");
        assert!(path.exists());
    }

    #[test]
    fn what_is_no_socket_is_refused_and_left_alone() {
        let (directory, path) = scratch();
        fs::write(&path, "precious").unwrap();
        assert_eq!(ServerSocket::bind(&plan(&path)).unwrap_err().code(), "conflict");
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");

        let inner = directory.path().join("inner");
        fs::create_dir(&inner).unwrap();
        assert_eq!(ServerSocket::bind(&plan(&inner)).unwrap_err().code(), "conflict");

        // Links are not followed, not even to a stale socket or to nothing.
        let (link, target) = (directory.path().join("link"), directory.path().join("target"));
        symlink(&target, &link).unwrap();
        assert_eq!(ServerSocket::bind(&plan(&link)).unwrap_err().code(), "conflict");
        drop(UnixListener::bind(&target).unwrap());
        assert_eq!(ServerSocket::bind(&plan(&link)).unwrap_err().code(), "conflict");
        assert!(target.exists());
        assert_eq!(files(&directory).len(), 4, "no hidden file is left");
    }

    #[test]
    fn hidden_names_of_killed_daemons_are_removed() {
        let _no_forks = no_forks();
        let (directory, path) = scratch();
        let name = |name: &str| directory.path().join(name);
        let age = |path: &Path| {
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
            let time = rustix::fs::Timespec { tv_sec: now.as_secs() as i64 - 60, tv_nsec: 0 };
            let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
            rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
        };
        let (left, also, young) =
            (name(".virtio-forwarder.1.0"), name(".virtio-forwarder.7a.3"), name(".virtio-forwarder.2.0"));
        let (alive, file, other) = (name(".virtio-forwarder.3.0"), name(".virtio-forwarder.4.0"), name(".other.1.0"));
        for stale in [&left, &also, &young, &other] {
            drop(UnixListener::bind(stale).unwrap());
        }
        let _alive = UnixListener::bind(&alive).unwrap();
        fs::write(&file, "precious").unwrap();
        for old in [&left, &also, &alive, &file, &other] {
            age(old);
        }
        let server = ServerSocket::bind(&plan(&path)).unwrap();
        assert!(!left.exists() && !also.exists());
        // Of a daemon that is just about to listen; alive; no socket; of somebody else's making.
        assert!([&young, &alive, &file, &other].iter().all(|path| path.exists()));
        drop(server);
        assert_eq!(files(&directory).len(), 4);
    }

    #[test]
    fn a_drop_removes_only_our_own_file() {
        let (_directory, path) = scratch();
        let server = ServerSocket::bind(&plan(&path)).unwrap();
        fs::remove_file(&path).unwrap();
        let theirs = UnixListener::bind(&path).unwrap();
        drop(server);
        assert!(path.exists());
        drop(theirs);
        // And nothing where somebody else removed it.
        fs::remove_file(&path).unwrap();
        let server = ServerSocket::bind(&plan(&path)).unwrap();
        fs::remove_file(&path).unwrap();
        drop(server);
    }

    /// The directory may be renamed under us: we work on the one that was opened.
    #[test]
    fn the_directory_is_the_one_that_was_opened() {
        let (directory, _) = scratch();
        let (before, after) = (directory.path().join("before"), directory.path().join("after"));
        fs::create_dir(&before).unwrap();
        let server = ServerSocket::bind(&plan(&before.join("port.sock"))).unwrap();
        fs::rename(&before, &after).unwrap();
        assert!(try_connect(&after.join("port.sock")).unwrap().is_some());
        drop(server);
        assert_eq!(fs::read_dir(&after).unwrap().count(), 0);
    }

    /// Whoever checked the path resolved its links: one that is there now was put there since.
    #[test]
    fn a_link_in_place_of_the_directory_is_refused() {
        let (directory, _) = scratch();
        let (real, link) = (directory.path().join("real"), directory.path().join("link"));
        fs::create_dir_all(real.join("inner")).unwrap();
        symlink(&real, &link).unwrap();
        for bad in ["link/port.sock", "link/inner/port.sock"] {
            let error = ServerSocket::bind(&plan(&directory.path().join(bad))).unwrap_err();
            assert_eq!(error.code(), "conflict", "{error}");
        }
        assert_eq!((fs::read_dir(&real).unwrap().count(), files(&directory).len()), (1, 2));
        ServerSocket::bind(&plan(&real.join("inner/port.sock"))).unwrap();
    }

    #[test]
    fn paths_no_client_could_use_are_refused() {
        let _no_forks = no_forks();
        let (directory, path) = scratch();
        let long = directory.path().join("x".repeat(108));
        for bad in [Path::new("relative.sock"), Path::new("/"), &long, &directory.path().join("..")] {
            assert_eq!(ServerSocket::bind(&plan(bad)).unwrap_err().code(), "invalid", "{}", bad.display());
            assert_eq!(try_connect(bad).unwrap_err().code(), "invalid", "{}", bad.display());
        }
        // As long as an address can be: longer than our way through /proc could take.
        let room = MAX_PATH - directory.path().as_os_str().len() - 1;
        let longest = directory.path().join("x".repeat(room));
        drop(UnixListener::bind(&longest).unwrap());
        let server = ServerSocket::bind(&plan(&longest)).unwrap();
        assert!(try_connect(&longest).unwrap().is_some());
        drop(server);
        // No such directory, and a file where a directory should be.
        fs::write(&path, "").unwrap();
        for (bad, hint) in [(directory.path().join("missing/port.sock"), "create"), (path.join("port.sock"), "")] {
            let error = ServerSocket::bind(&plan(&bad)).unwrap_err();
            assert_eq!(error.code(), "io");
            assert!(error.to_string().contains(hint), "{error}");
        }
        assert_eq!(try_connect(&path.join("port.sock")).unwrap_err().code(), "io");
    }

    /// Whoever connects by the final name finds its final mode, at any moment of a hundred replacements.
    #[test]
    fn there_is_no_moment_with_another_mode() {
        let _no_forks = no_forks();
        let (_directory, path) = scratch();
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let watcher = scope.spawn(|| {
                let mut seen = 0;
                while !stop.load(Ordering::Relaxed) {
                    if let Ok(metadata) = fs::symlink_metadata(&path) {
                        assert_eq!(metadata.mode() & 0o7777, 0o640);
                        seen += 1;
                    }
                }
                seen
            });
            let plan = SocketPlan { mode: 0o640, ..plan(&path) };
            let mut result = Ok(());
            for _ in 0..200 {
                match ServerSocket::bind(&plan) {
                    // As if killed: the file stays, but nobody listens.
                    Ok(mut server) => server.identity.ino = 0,
                    Err(error) => result = Err(error),
                }
            }
            stop.store(true, Ordering::Relaxed);
            result.unwrap();
            assert!(watcher.join().unwrap() > 0);
        });
    }
}
