//! The socket on which clients ask.

use std::fs;
use std::path::PathBuf;

use crate::error::{Error, Result};
use crate::session::port::{Role, SocketPlan};
use crate::session::socket::ServerSocket;

/// Where and for whom the daemon listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlSocket {
    /// Absolute.
    pub path: PathBuf,
    /// Permission bits.
    pub mode: u32,
    /// Group; `None`: the daemon's.
    pub gid: Option<u32>,
}

impl ControlSocket {
    /// Listens, as a port's server socket does: a stale socket is replaced, one on which somebody listens
    /// is refused. A missing directory is created; links on the way to it are the operator's and followed.
    pub fn listen(&self) -> Result<ServerSocket> {
        let Self { mut path, mode, gid } = self.clone();
        if let (Some(directory), Some(name)) = (self.path.parent(), self.path.file_name()) {
            path = fs::create_dir_all(directory)
                .and_then(|()| directory.canonicalize())
                .map_err(Error::io(format!("creating {}, the control socket's directory", directory.display())))?
                .join(name);
        }
        let plan = SocketPlan { path, role: Role::Server, uid: None, gid, mode };
        ServerSocket::bind(&plan).map_err(|error| match error {
            Error::Conflict(what) => Error::Conflict(format!(
                "control socket: {what}; stop what uses it, or choose another path with --control-socket"
            )),
            other => other,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_refused() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("new/control.sock");
        let socket = ControlSocket { path: path.clone(), mode: 0o640, gid: None };
        let first = socket.listen().unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
        let error = socket.listen().unwrap_err();
        assert_eq!(error.code(), "conflict");
        assert!(error.to_string().contains("--control-socket"), "{error}");
        drop(first);
        assert!(!path.exists());
        std::os::unix::fs::symlink("new", root.path().join("link")).unwrap();
        let linked = ControlSocket { path: root.path().join("link/control.sock"), ..socket.clone() };
        drop(linked.listen().unwrap());
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "std leaves the file: a stale socket");
        socket.listen().unwrap();
    }
}
