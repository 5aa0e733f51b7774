//! A request for a port, checked and resolved: two requests that mean the same compare equal.

use std::collections::BTreeSet;

use super::api::{Attach, FileMode, NameOrNumber, Socket};
use super::policy::{Policy, SocketPath};
use super::{PortId, unix_names};
use crate::error::{Error, Result};
use crate::ethernet::{MAX_MTU, MIN_MTU};
use crate::session::Offer;
use crate::session::features::Offloads;
use crate::session::port::{Role, SocketPlan, ZeroCopy};
use crate::vf::{Mac, VfCaps, VfConfig, VfSpec};

/// Most VFs a port can name.
const MAX_VFS: usize = 8;

/// What a socket gets when the request does not say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketDefaults {
    /// Owner of listening sockets; `None`: the daemon's user.
    pub owner: Option<NameOrNumber>,
    /// Their group.
    pub group: Option<NameOrNumber>,
    /// Their mode.
    pub mode: FileMode,
}

impl Default for SocketDefaults {
    fn default() -> Self {
        Self { owner: None, group: None, mode: FileMode(0o660) }
    }
}

/// A port as it should be. VFs, socket path and role are its identity; everything else is an attribute
/// that can change while the port lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortSpec {
    /// Its id.
    pub id: PortId,
    pub(super) path: SocketPath,
    pub(super) role: Role,
    pub(super) vfs: Vec<VfSpec>,
    pub(super) owner: Option<(NameOrNumber, u32)>,
    pub(super) group: Option<(NameOrNumber, u32)>,
    pub(super) mode: FileMode,
    pub(super) queue_pairs: u16,
    pub(super) mtu: u16,
    pub(super) mac: Option<Mac>,
    pub(super) cores: Vec<usize>,
    pub(super) offloads: Offloads,
    pub(super) zero_copy: ZeroCopy,
    /// What it holds exclusively.
    pub(super) claims: BTreeSet<String>,
}

impl PortSpec {
    /// Checks a request against the configuration and fills in the defaults.
    pub fn new(request: &Attach, policy: &Policy, defaults: &SocketDefaults) -> Result<Self> {
        let Socket { path, role, owner, group, mode } = &request.socket;
        let path = policy.socket(path)?;
        if *role == Role::Client && (owner.is_some() || group.is_some() || mode.is_some()) {
            return Err(Error::Invalid(
                "socket owner, group and mode are set by who listens: leave them out with role client".into(),
            ));
        }
        if !(1..=MAX_VFS).contains(&request.vfs.len()) {
            return Err(Error::Invalid(format!(
                "{} VFs are named: name 1 to {MAX_VFS}, the first is used",
                request.vfs.len()
            )));
        }
        let mut claims = BTreeSet::from([format!("socket {}", path.real.display())]);
        for vf in &request.vfs {
            policy.check_vf(vf)?;
            if let Some(twice) = policy.claims(vf).into_iter().find(|claim| !claims.insert(claim.clone())) {
                return Err(Error::Invalid(format!("{twice} is named twice: name it once")));
            }
        }
        let queue_pairs = request.queue_pairs.unwrap_or(1);
        if !(1..=Offer::MAX_QUEUE_PAIRS).contains(&queue_pairs) {
            return Err(Error::Invalid(format!("{queue_pairs} queue pairs: use 1 to {}", Offer::MAX_QUEUE_PAIRS)));
        }
        let mtu = request.mtu.unwrap_or(1500);
        if !(MIN_MTU..=MAX_MTU).contains(&mtu) {
            return Err(Error::Invalid(format!("MTU {mtu}: use {MIN_MTU} to {MAX_MTU}")));
        }
        let server = *role == Role::Server;
        let resolve = |asked: &Option<NameOrNumber>, default: &Option<NameOrNumber>, id: fn(&str) -> Result<u32>| {
            let name = asked.as_ref().or(default.as_ref()).filter(|_| server);
            name.map(|name| Ok((name.clone(), id(&name.to_string())?))).transpose()
        };
        Ok(Self {
            id: request.id.clone(),
            path,
            role: *role,
            vfs: request.vfs.clone(),
            owner: resolve(owner, &defaults.owner, unix_names::user_id)?,
            group: resolve(group, &defaults.group, unix_names::group_id)?,
            mode: mode.unwrap_or(defaults.mode),
            queue_pairs,
            mtu,
            mac: request.mac,
            cores: request.cores.clone(),
            offloads: request.offloads.clone().unwrap_or_default(),
            zero_copy: request.zero_copy.unwrap_or_default(),
            claims,
        })
    }

    /// Parts of the identity in which `self` and `other` differ, each with both values; empty: one port.
    pub(super) fn identity_differences(&self, other: &Self) -> Vec<(&'static str, String, String)> {
        let vfs = |spec: &Self| spec.vfs.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        let role = |spec: &Self| match spec.role {
            Role::Server => "server".to_owned(),
            Role::Client => "client".to_owned(),
        };
        let path = |spec: &Self| spec.path.path.display().to_string();
        let mut all = vec![];
        if self.vfs != other.vfs {
            all.push(("vfs", vfs(self), vfs(other)));
        }
        if self.path.real != other.path.real {
            all.push(("socket.path", path(self), path(other)));
        }
        if self.role != other.role {
            all.push(("socket.role", role(self), role(other)));
        }
        all
    }

    /// Attributes that only take effect with no guest connected, in which `self` and `other` differ.
    pub(super) fn deferred_differences(&self, other: &Self) -> Vec<&'static str> {
        let mut all = vec![];
        let mut differ = |name, differs: bool| differs.then(|| all.push(name));
        differ("queue_pairs", self.queue_pairs != other.queue_pairs);
        differ("mtu", self.mtu != other.mtu);
        differ("offloads", self.offloads != other.offloads);
        // A VF's own MAC comes back when it is configured anew, not before.
        differ("mac", self.mac.is_some() && other.mac.is_none());
        all
    }

    /// Is any attribute different?
    pub(super) fn attributes_differ(&self, other: &Self) -> bool {
        self.deferred_differences(other) != [""; 0]
            || self.mac != other.mac
            || self.cores != other.cores
            || self.zero_copy != other.zero_copy
            || self.socket_plan() != other.socket_plan()
    }

    /// For the port thread. The path is without the links the client's may have: where they lead to was
    /// looked at when the daemon started, and who can change one does not choose where we write.
    pub(super) fn socket_plan(&self) -> SocketPlan {
        SocketPlan {
            path: self.path.real.clone(),
            role: self.role,
            uid: self.owner.as_ref().map(|(_, uid)| *uid),
            gid: self.group.as_ref().map(|(_, gid)| *gid),
            mode: self.mode.0,
        }
    }

    /// What guests are offered when the VF can do `caps`.
    pub(super) fn offer(&self, caps: Option<&VfCaps>) -> Offer {
        Offer::resolve(&self.offloads, caps, self.queue_pairs, self.mtu)
    }

    /// How the VF is configured.
    pub(super) fn vf_config(&self) -> VfConfig {
        VfConfig { queues: self.queue_pairs, mtu: self.mtu, mac: self.mac }
    }

    /// The socket, for clients.
    pub(super) fn socket_view(&self) -> Socket {
        Socket {
            path: self.path.path.display().to_string(),
            role: self.role,
            owner: self.owner.as_ref().map(|(name, _)| name.clone()),
            group: self.group.as_ref().map(|(name, _)| name.clone()),
            mode: (self.role == Role::Server).then_some(self.mode),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::SocketDir;

    #[test]
    fn a_socket_is_where_its_directory_was_and_is_shown_as_named() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path().canonicalize().unwrap();
        std::fs::create_dir(root.join("run")).unwrap();
        let alias = root.join("alias");
        std::os::unix::fs::symlink("run", &alias).unwrap();
        let policy = Policy {
            guest_memory: 1 << 40,
            vdevs: vec![],
            pci: vec![],
            socket_dirs: vec![SocketDir::new(&alias).unwrap()],
            stand_ins: vec![],
            control_socket: root.join("control.sock"),
            sysfs: root.clone(),
        };
        let spec = || {
            let params = serde_json::json!({"id": "a", "vfs": ["soft:null"], "socket": {"path": alias.join("a")}});
            let request = serde_json::from_value(params).unwrap();
            PortSpec::new(&request, &policy, &SocketDefaults::default()).unwrap()
        };
        let first = spec();
        std::fs::remove_file(&alias).unwrap();
        std::os::unix::fs::symlink("/etc", &alias).unwrap();
        assert_eq!(spec(), first);
        assert_eq!(first.socket_plan().path, root.join("run/a"));
        assert_eq!(first.socket_view().path, alias.join("a").to_str().unwrap());
    }
}
