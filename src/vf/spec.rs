//! How a VF is named: `0000:05:08.1`, `vdev:net_tap0,iface=vf0`, `soft:null`, `soft:loop`.

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::Error;

/// Domain, bus, device, function of a PCI device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    /// 0 to 0xffff_ffff (Linux invents wide domains for VMD).
    pub domain: u32,
    /// Bus.
    pub bus: u8,
    /// Device, 0 to 31.
    pub device: u8,
    /// Function, 0 to 7.
    pub function: u8,
}

/// An Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

/// Which VF. Text form through `Display` and `FromStr`; two texts of one VF compare equal.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum VfSpec {
    /// A PCI function.
    Pci(PciAddress),
    /// A DPDK virtual device: name (driver and number, e.g. `net_tap0`) and its arguments in order.
    Vdev {
        /// `net_tap0`
        name: String,
        /// `[("iface", "vf0")]`
        args: Vec<(String, String)>,
    },
    /// Discards what it is sent, receives nothing.
    SoftNull,
    /// Receives what it is sent.
    SoftLoop,
}

impl VfSpec {
    /// Driver of a vdev: its name without the number (`net_tap`); `None` for the others.
    pub fn vdev_driver(&self) -> Option<&str> {
        match self {
            Self::Vdev { name, .. } => Some(name.trim_end_matches(|c: char| c.is_ascii_digit())),
            _ => None,
        }
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{:x}", self.domain, self.bus, self.device, self.function)
    }
}

impl FromStr for PciAddress {
    type Err = Error;

    /// `0000:05:08.1`, or `05:08.1` in domain 0; hex digits of either case.
    fn from_str(text: &str) -> Result<Self, Error> {
        parse_pci(text)
            .ok_or_else(|| Error::Invalid(format!("`{text}` is not a PCI address; write it like 0000:05:08.1")))
    }
}

fn parse_pci(text: &str) -> Option<PciAddress> {
    let (rest, function) = text.rsplit_once('.')?;
    let (rest, device) = rest.rsplit_once(':')?;
    let (domain, bus) = rest.rsplit_once(':').unwrap_or(("0000", rest));
    Some(PciAddress {
        domain: hex(domain, 4..=8)?,
        bus: hex(bus, 2..=2)? as u8,
        device: hex(device, 2..=2).filter(|&device| device < 32)? as u8,
        function: hex(function, 1..=1).filter(|&function| function < 8)? as u8,
    })
}

/// `digits` hex digits and nothing else (`from_str_radix` takes a sign).
fn hex(text: &str, digits: RangeInclusive<usize>) -> Option<u32> {
    (digits.contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit()))
        .then(|| u32::from_str_radix(text, 16).ok())
        .flatten()
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = Error;

    /// A unicast address as six hex pairs.
    fn from_str(text: &str) -> Result<Self, Error> {
        let mut mac = [0; 6];
        let mut pairs = text.split(':');
        for byte in &mut mac {
            *byte = pairs.next().and_then(|pair| hex(pair, 2..=2)).ok_or_else(|| not_a_mac(text))? as u8;
        }
        if pairs.next().is_some() || mac == [0; 6] || mac[0] & 1 != 0 {
            return Err(not_a_mac(text));
        }
        Ok(Self(mac))
    }
}

fn not_a_mac(text: &str) -> Error {
    Error::Invalid(format!("`{text}` is not a unicast MAC address; write it like 52:54:00:12:34:56"))
}

impl TryFrom<String> for Mac {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

impl fmt::Display for VfSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pci(address) => address.fmt(f),
            Self::Vdev { name, args } => {
                write!(f, "vdev:{name}")?;
                args.iter().try_for_each(|(key, value)| write!(f, ",{key}={value}"))
            }
            Self::SoftNull => f.write_str("soft:null"),
            Self::SoftLoop => f.write_str("soft:loop"),
        }
    }
}

impl FromStr for VfSpec {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "soft:null" => Ok(Self::SoftNull),
            "soft:loop" => Ok(Self::SoftLoop),
            _ => match text.strip_prefix("vdev:") {
                Some(vdev) => parse_vdev(vdev),
                None => parse_pci(text).map(Self::Pci).ok_or_else(|| {
                    Error::Invalid(format!(
                        "`{text}` names no VF; write a PCI address (0000:05:08.1), vdev:DRIVERn,KEY=VALUE,… \
                         (vdev:net_tap0,iface=vf0), soft:null or soft:loop"
                    ))
                }),
            },
        }
    }
}

/// Longest device name DPDK takes (RTE_DEV_NAME_MAX_LEN less the NUL).
const VDEV_NAME: usize = 63;

fn parse_vdev(text: &str) -> Result<VfSpec, Error> {
    let wrong = |why: &str| Err(Error::Invalid(format!("`vdev:{text}`: {why}")));
    let mut parts = text.split(',');
    let name = parts.next().unwrap_or_default();
    let word = |text: &str, extra: &[u8]| {
        !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || extra.contains(&b))
    };
    if !word(name, b"") || name.len() > VDEV_NAME {
        return wrong("a vdev's name is 1 to 63 letters, digits and underscores");
    }
    if !name.ends_with(|c: char| c.is_ascii_digit()) || !name.starts_with(|c: char| c.is_ascii_alphabetic()) {
        return wrong("a vdev is named by its driver and a number, like net_tap0");
    }
    let mut args: Vec<(String, String)> = Vec::new();
    for part in parts {
        let Some((key, value)) = part.split_once('=') else {
            return wrong("arguments are KEY=VALUE, separated by commas");
        };
        if !word(key, b"-") {
            return wrong("an argument's key is letters, digits, - and _");
        }
        if value.is_empty() || !value.bytes().all(|b| b.is_ascii_graphic()) {
            return wrong("an argument's value is printable, without spaces and commas");
        }
        if args.iter().any(|(known, _)| known == key) {
            return wrong("an argument is given twice");
        }
        args.push((key.to_owned(), value.to_owned()));
    }
    Ok(VfSpec::Vdev { name: name.to_owned(), args })
}

impl TryFrom<String> for VfSpec {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

impl From<VfSpec> for String {
    fn from(spec: VfSpec) -> Self {
        spec.to_string()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn refused(text: &str, part: &str) {
        match text.parse::<VfSpec>() {
            Err(Error::Invalid(message)) => assert!(message.contains(part), "{message}"),
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn texts_of_one_vf_compare_equal() {
        let vf: VfSpec = "0000:05:0a.1".parse().unwrap();
        assert_eq!(vf, "05:0A.1".parse().unwrap());
        assert_eq!(vf.to_string(), "0000:05:0a.1");
        assert_eq!("soft:null".parse::<VfSpec>().unwrap(), VfSpec::SoftNull);
        let wide: VfSpec = "10000:e1:00.0".parse().unwrap();
        assert_eq!(wide.to_string(), "10000:e1:00.0");
    }

    #[test]
    fn what_names_no_vf_is_refused_with_the_reason() {
        for text in ["", "eth0", "soft:", "0000:05:08", "0000:05:20.0", "0000:05:08.8"] {
            refused(text, "names no VF");
        }
        refused("000:05:08.1", "names no VF");
        refused("0000:+5:08.1", "names no VF");
        refused("0000:05:08.1 ", "names no VF");
        refused("vdev:", "name is 1 to 63");
        refused("vdev:net_tap0 ", "name is 1 to 63");
        refused(&format!("vdev:{}0", "n".repeat(63)), "name is 1 to 63");
        refused("vdev:net_tap", "like net_tap0");
        refused("vdev:0", "like net_tap0");
        refused("vdev:net_tap0,iface", "KEY=VALUE");
        refused("vdev:net_tap0,", "KEY=VALUE");
        refused("vdev:net_tap0,=x", "key is letters");
        refused("vdev:net_tap0,iface=", "value is printable");
        refused("vdev:net_tap0,iface=v f", "value is printable");
        refused("vdev:net_tap0,iface=a,iface=b", "given twice");
    }

    #[test]
    fn a_vdev_knows_its_driver() {
        let vf: VfSpec = "vdev:net_tap10,iface=vf0".parse().unwrap();
        assert_eq!(vf.vdev_driver(), Some("net_tap"));
    }

    #[test]
    fn a_mac_is_six_pairs_and_unicast() {
        let mac: Mac = "52:54:00:AB:cd:01".parse().unwrap();
        assert_eq!(mac.to_string(), "52:54:00:ab:cd:01");
        for text in [
            "",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "52:54:00:12:34:+6",
            "52:54:00:12:34:5",
            "00:00:00:00:00:00",
            "01:00:5e:00:00:01",
            "ff:ff:ff:ff:ff:ff",
        ] {
            assert!(text.parse::<Mac>().is_err(), "{text}");
        }
    }

    fn vdev() -> impl Strategy<Value = VfSpec> {
        ("[a-z][a-z_]{0,20}[0-9]{1,3}", prop::collection::hash_map("[a-zA-Z0-9_-]{1,8}", "[!-+\\--~]{1,12}", 0..4))
            .prop_map(|(name, args)| VfSpec::Vdev { name, args: args.into_iter().collect() })
    }

    fn pci() -> impl Strategy<Value = VfSpec> {
        (any::<u32>(), any::<u8>(), 0..32u8, 0..8u8)
            .prop_map(|(domain, bus, device, function)| VfSpec::Pci(PciAddress { domain, bus, device, function }))
    }

    proptest! {
        #[test]
        fn a_spec_survives_its_text(vf in prop_oneof![vdev(), pci()]) {
            prop_assert_eq!(vf.to_string().parse::<VfSpec>().unwrap(), vf);
        }

        #[test]
        fn a_text_that_parses_is_found_again(text in "\\PC{0,40}|vdev:[a-z0-9_,= ]{0,30}|[0-9a-f:.]{8,14}") {
            if let Ok(vf) = text.parse::<VfSpec>() {
                prop_assert_eq!(vf.to_string().parse::<VfSpec>().unwrap(), vf);
            }
        }
    }
}
