//! Messages, decoded: sizes, fd counts and everything that can be judged without the session's state.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl, readlink};
use vhost::vhost_user::message::FrontendReq;

use super::wire::{MAX_FDS, Request};
use crate::error::{Error, Result};
use crate::guest::{Gpa, RegionSpec, UserAddr};
use crate::ring::RingAddresses;

/// Bytes of one region in a message.
const REGION_LEN: usize = 32;

/// A message of the front end. Ring indices are as received: not yet held against the queue count.
#[derive(Debug)]
pub enum Message {
    /// GET_FEATURES
    GetFeatures,
    /// SET_FEATURES
    SetFeatures(u64),
    /// SET_OWNER
    SetOwner,
    /// RESET_OWNER
    ResetOwner,
    /// GET_PROTOCOL_FEATURES
    GetProtocolFeatures,
    /// SET_PROTOCOL_FEATURES
    SetProtocolFeatures(u64),
    /// GET_QUEUE_NUM
    GetQueueNum,
    /// SET_MEM_TABLE
    SetMemTable(Vec<(RegionSpec, Arc<File>)>),
    /// GET_MAX_MEM_SLOTS
    GetMaxMemSlots,
    /// ADD_MEM_REG
    AddMemReg(RegionSpec, Arc<File>),
    /// REM_MEM_REG; the offset means nothing.
    RemMemReg(RegionSpec),
    /// SET_VRING_NUM: ring, size
    SetVringNum(u32, u32),
    /// SET_VRING_ADDR: ring, flags, where
    SetVringAddr(u32, u32, RingAddresses),
    /// SET_VRING_BASE: ring, position
    SetVringBase(u32, u32),
    /// GET_VRING_BASE: ring
    GetVringBase(u32),
    /// SET_VRING_KICK: ring, eventfd
    SetVringKick(u32, Option<Arc<OwnedFd>>),
    /// SET_VRING_CALL: ring, eventfd
    SetVringCall(u32, Option<Arc<OwnedFd>>),
    /// SET_VRING_ERR: ring, eventfd
    SetVringErr(u32, Option<Arc<OwnedFd>>),
    /// SET_VRING_ENABLE: ring, on
    SetVringEnable(u32, bool),
    /// NET_SET_MTU
    NetSetMtu(u64),
    /// SET_STATUS
    SetStatus(u64),
    /// GET_STATUS
    GetStatus,
    /// RESET_DEVICE
    ResetDevice,
}

impl Message {
    /// Decodes a request. Whatever is wrong with it, its fds are closed.
    pub fn decode(request: Request) -> Result<Self> {
        let name = request.name();
        let Ok(code) = FrontendReq::try_from(request.code) else {
            return Err(Error::Protocol(format!("{name} does not exist")));
        };
        let mut parts = Parts { name, body: &request.body, fds: request.fds };
        let message = match code {
            FrontendReq::GET_FEATURES => Self::GetFeatures,
            FrontendReq::SET_FEATURES => Self::SetFeatures(parts.u64()?),
            FrontendReq::SET_OWNER => Self::SetOwner,
            FrontendReq::RESET_OWNER => Self::ResetOwner,
            FrontendReq::GET_PROTOCOL_FEATURES => Self::GetProtocolFeatures,
            FrontendReq::SET_PROTOCOL_FEATURES => Self::SetProtocolFeatures(parts.u64()?),
            FrontendReq::GET_QUEUE_NUM => Self::GetQueueNum,
            FrontendReq::SET_MEM_TABLE => Self::SetMemTable(parts.memory_table()?),
            FrontendReq::GET_MAX_MEM_SLOTS => Self::GetMaxMemSlots,
            FrontendReq::ADD_MEM_REG => {
                let region = parts.single_region()?;
                Self::AddMemReg(region, Arc::new(parts.fd()?.into()))
            }
            FrontendReq::REM_MEM_REG => {
                let region = parts.single_region()?;
                // The specification lets a back end tolerate one fd; it is closed.
                parts.fds.pop();
                Self::RemMemReg(region)
            }
            FrontendReq::SET_VRING_NUM => Self::SetVringNum(parts.u32()?, parts.u32()?),
            FrontendReq::SET_VRING_ADDR => {
                let (ring, flags) = (parts.u32()?, parts.u32()?);
                let (desc, used, avail) = (parts.u64()?, parts.u64()?, parts.u64()?);
                // The address for dirty logging of the used ring; logging is not offered.
                let _log = parts.u64()?;
                let addresses = RingAddresses { desc: UserAddr(desc), avail: UserAddr(avail), used: UserAddr(used) };
                Self::SetVringAddr(ring, flags, addresses)
            }
            FrontendReq::SET_VRING_BASE => Self::SetVringBase(parts.u32()?, parts.u32()?),
            FrontendReq::GET_VRING_BASE => {
                let (ring, _unused) = (parts.u32()?, parts.u32()?);
                Self::GetVringBase(ring)
            }
            FrontendReq::SET_VRING_KICK => {
                let (ring, eventfd) = parts.ring_eventfd()?;
                Self::SetVringKick(ring, eventfd)
            }
            FrontendReq::SET_VRING_CALL => {
                let (ring, eventfd) = parts.ring_eventfd()?;
                Self::SetVringCall(ring, eventfd)
            }
            FrontendReq::SET_VRING_ERR => {
                let (ring, eventfd) = parts.ring_eventfd()?;
                Self::SetVringErr(ring, eventfd)
            }
            FrontendReq::SET_VRING_ENABLE => {
                let (ring, on) = (parts.u32()?, parts.u32()?);
                if on > 1 {
                    return Err(parts.wrong(format_args!("wants ring {ring} in state {on}")));
                }
                Self::SetVringEnable(ring, on == 1)
            }
            FrontendReq::NET_SET_MTU => Self::NetSetMtu(parts.u64()?),
            FrontendReq::SET_STATUS => Self::SetStatus(parts.u64()?),
            FrontendReq::GET_STATUS => Self::GetStatus,
            FrontendReq::RESET_DEVICE => Self::ResetDevice,
            _ => {
                return Err(parts.wrong(format_args!("is not served: its feature was not offered")));
            }
        };
        parts.finish()?;
        Ok(message)
    }
}

/// What is left of a message while it is taken apart.
struct Parts<'a> {
    name: String,
    body: &'a [u8],
    fds: Vec<OwnedFd>,
}

impl Parts<'_> {
    fn wrong(&self, what: impl std::fmt::Display) -> Error {
        Error::Protocol(format!("{} {what}", self.name))
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        let Some((bytes, rest)) = self.body.split_first_chunk::<N>() else {
            return Err(self.wrong("has too short a body"));
        };
        self.body = rest;
        Ok(*bytes)
    }

    fn u32(&mut self) -> Result<u32> {
        self.take().map(u32::from_ne_bytes)
    }

    fn u64(&mut self) -> Result<u64> {
        self.take().map(u64::from_ne_bytes)
    }

    fn region(&mut self) -> Result<RegionSpec> {
        Ok(RegionSpec { gpa: Gpa(self.u64()?), size: self.u64()?, user: UserAddr(self.u64()?), offset: self.u64()? })
    }

    fn single_region(&mut self) -> Result<RegionSpec> {
        let _padding = self.u64()?;
        self.region()
    }

    fn memory_table(&mut self) -> Result<Vec<(RegionSpec, Arc<File>)>> {
        let (count, _padding) = (self.u32()? as usize, self.u32()?);
        if count > MAX_FDS || self.body.len() != count * REGION_LEN || self.fds.len() != count {
            return Err(self.wrong(format_args!(
                "names {count} regions, with {} bytes of them and {} fds",
                self.body.len(),
                self.fds.len()
            )));
        }
        let files: Vec<_> = self.fds.drain(..).map(File::from).collect();
        files.into_iter().map(|file| Ok((self.region()?, Arc::new(file)))).collect()
    }

    fn fd(&mut self) -> Result<OwnedFd> {
        let fd = self.fds.pop();
        fd.ok_or_else(|| self.wrong("comes without its fd"))
    }

    /// Ring index in bits 0 to 7; bit 8 says that there is no fd. The other bits mean nothing yet,
    /// so they must be zero: a larger index must not be taken for a small one.
    fn ring_eventfd(&mut self) -> Result<(u32, Option<Arc<OwnedFd>>)> {
        const NO_FD: u64 = 1 << 8;
        let value = self.u64()?;
        let Ok(ring) = u8::try_from(value & !NO_FD) else {
            return Err(self.wrong(format_args!("has an odd ring index, {value:#x}")));
        };
        if value & NO_FD != 0 {
            return Ok((ring.into(), None));
        }
        let fd = self.fd()?;
        self.check_eventfd(&fd)?;
        Ok((ring.into(), Some(Arc::new(fd))))
    }

    /// A core writes to these fds: a pipe, a file or a socket could block it or be made to do harm.
    /// A blocking eventfd at its maximum would block it too. EFD_SEMAPHORE does not matter: it changes what a
    /// read takes, and we read none of them.
    fn check_eventfd(&self, fd: &OwnedFd) -> Result<()> {
        let raw = fd.as_raw_fd();
        let link = readlink(format!("/proc/self/fd/{raw}"), Vec::new())
            .map_err(|errno| Error::io("looking at the kind of an fd in /proc")(errno.into()))?;
        if link.as_bytes() != b"anon_inode:[eventfd]" {
            return Err(self.wrong(format_args!("passes {link:?} where an eventfd belongs")));
        }
        fcntl_getfl(fd)
            .and_then(|flags| fcntl_setfl(fd, flags | OFlags::NONBLOCK))
            .map_err(|errno| Error::io("making an eventfd non-blocking")(errno.into()))
    }

    /// Nothing may be left over.
    fn finish(self) -> Result<()> {
        if !self.body.is_empty() {
            return Err(self.wrong(format_args!("has {} bytes too many", self.body.len())));
        }
        if !self.fds.is_empty() {
            return Err(self.wrong(format_args!("passes {} fds too many", self.fds.len())));
        }
        Ok(())
    }
}
