//! Where to listen: on this machine alone, unless an address of others' is written out **and** allowed.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use crate::exit::{Code, Failure, Result};

/// An address that may be listened on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Address(SocketAddr);

impl Address {
    /// Reads `9090`, `:9090`, `localhost:9090`, `127.0.0.1:9090` or `[::1]:9090`; any other host only when `public`.
    pub(crate) fn read(text: &str, public: bool) -> Result<Self> {
        let port = text.strip_prefix(':').or_else(|| text.strip_prefix("localhost:"));
        let socket = match port.unwrap_or(text).parse::<u16>() {
            Ok(port) => SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port),
            Err(_) => text.parse::<SocketAddr>().map_err(|error| {
                Failure::new(Code::Usage, format!("listen: {error} (value: {text:?})"))
                    .hint("a port such as 9090, for this machine alone, or an address such as 127.0.0.1:9090 or [::1]:9090")
            })?,
        };
        if !socket.ip().to_canonical().is_loopback() && !public {
            return Err(Failure::new(
                Code::Usage,
                format!("listen: others can reach {socket}, and whoever does may read what is served"),
            )
            .hint("give --listen-public as well (relay.listen_public in the file) when that is meant, or a port alone"));
        }
        Ok(Self(socket))
    }

    pub(crate) const fn socket(&self) -> SocketAddr {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_alone_is_of_this_machine() {
        for text in ["9090", ":9090", "localhost:9090", "127.0.0.1:9090"] {
            assert_eq!(
                Address::read(text, false).unwrap().0.to_string(),
                "127.0.0.1:9090"
            );
        }
        assert_eq!(Address::read("[::1]:9", false).unwrap().0.to_string(), "[::1]:9");
    }

    #[test]
    fn what_others_can_reach_has_to_be_allowed() {
        for text in [
            "0.0.0.0:9090",
            "[::]:9090",
            "10.0.0.1:9090",
            "[::ffff:10.0.0.1]:9090",
        ] {
            let failure = Address::read(text, false).unwrap_err();
            assert_eq!(failure.code, Code::Usage);
            assert!(failure.hint.unwrap().contains("--listen-public"));
            assert_eq!(Address::read(text, true).unwrap().0.to_string(), text);
        }
    }

    #[test]
    fn names_and_nonsense_are_refused() {
        for text in ["", ":", "example.com:80", "70000", "127.0.0.1", "::1:9090:"] {
            assert_eq!(Address::read(text, true).unwrap_err().code, Code::Usage, "{text}");
        }
    }
}
