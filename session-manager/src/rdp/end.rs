//! How an RDP client ended: a lost connection is not a closed client.
//!
//! The table is FreeRDP's (`client/X11/xfreerdp.h`, `client/SDL/SDL3/sdl_utils.hpp`; the same in 2.x and 3.x).

use crate::view::Message;
use std::fmt;

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientEnd {
    /// The person closed it, or the server ended the connection in order.
    Closed,
    /// The person logged off inside the desktop.
    LoggedOff,
    /// The server closed an idle connection.
    IdleTimeout,
    /// Another client took the session over.
    Replaced,
    /// The connection broke or could not be made.
    Lost,
    /// User name, password or account were refused.
    Credentials,
    /// The server showed another certificate than the announced one.
    Certificate,
    /// The address could not be resolved.
    Name,
    /// The server refused for another reason; with its code.
    Refused(i32),
    /// The client did not understand its command line; with its code.
    BadOptions(i32),
    /// A signal ended it.
    Killed(i32),
    /// Anything else; with its code.
    Unknown(i32),
}

/// What FreeRDP says when it refuses a certificate (`libfreerdp/crypto/tls.c`; the same in 2.x and 3.x).
const NOT_TRUSTED: &str = "certificate not trusted";

/// What an exit of a FreeRDP client means; `words` are the last it wrote. A code and a signal are two things: code 143 is
/// a TLS failure, death by SIGTERM (128 + 15 in a shell) is not. And a TLS failure can be a refused certificate or a
/// connection that broke in the handshake: only its words tell.
#[must_use]
pub fn end_of_freerdp(code: Option<i32>, signal: Option<i32>, words: &str) -> ClientEnd {
    use ClientEnd as E;
    if let Some(signal) = signal {
        return E::Killed(signal);
    }
    match code {
        // 145: cancelled by the person while connecting.
        Some(0 | 1 | 11 | 145) => E::Closed,
        Some(2 | 12) => E::LoggedOff,
        Some(3 | 4) => E::IdleTimeout,
        Some(5) => E::Replaced,
        Some(143) if words.contains(NOT_TRUSTED) => E::Certificate,
        // 133, 138, 142, 143: broke off during the connection sequence (133 also: the server does not offer the TLS that
        // we insist on); 160: the target is still starting.
        Some(131 | 133 | 138 | 141 | 142 | 143 | 147 | 160) => E::Lost,
        Some(132 | 134 | 135 | 144 | 148..=159) => E::Credentials,
        Some(139 | 140) => E::Name,
        // 23 is what 2.11 says to an unknown option; elsewhere it is a licence error: both are told with the code.
        Some(code @ (23 | 24 | 128)) => E::BadOptions(code),
        Some(code @ (7..=10 | 16..=22 | 25 | 26 | 32)) => E::Refused(code),
        Some(code) => E::Unknown(code),
        None => E::Unknown(-1),
    }
}

impl fmt::Display for ClientEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("closed"),
            Self::LoggedOff => f.write_str("logged off"),
            Self::IdleTimeout => f.write_str("closed by the server for being idle"),
            Self::Replaced => f.write_str("replaced by another connection"),
            Self::Lost => f.write_str("connection lost or not possible"),
            Self::Credentials => f.write_str("credentials refused"),
            Self::Certificate => f.write_str("the certificate is not the announced one"),
            Self::Name => f.write_str("address not resolved"),
            Self::Refused(code) => write!(f, "refused by the server (code {code})"),
            Self::BadOptions(code) => write!(f, "command line not understood (code {code})"),
            Self::Killed(signal) => write!(f, "killed by signal {signal}"),
            Self::Unknown(code) => write!(f, "code {code}"),
        }
    }
}

impl ClientEnd {
    /// Headline and what to do, when it is a failure.
    #[must_use]
    pub fn words(self) -> (Message, Message) {
        let (headline, hint) = match self {
            Self::Certificate => ("error-certificate", "error-certificate-hint"),
            Self::Credentials => ("error-login", "error-login-hint"),
            Self::Lost | Self::Name | Self::Refused(_) => ("error-connect", "error-connect-hint"),
            _ => ("error-client-failed", "error-client-failed-hint"),
        };
        (Message::new(headline), Message::new(hint))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_connection_a_closed_client_and_a_wrong_certificate_are_three_things() {
        use ClientEnd as E;
        for (code, end) in [
            (0, E::Closed),
            (11, E::Closed),
            (12, E::LoggedOff),
            (5, E::Replaced),
            (131, E::Lost),
            (133, E::Lost),
            (141, E::Lost),
            (147, E::Lost),
            (132, E::Credentials),
            (140, E::Name),
            (143, E::Lost),
            (24, E::BadOptions(24)),
            (255, E::Unknown(255)),
        ] {
            assert_eq!(end_of_freerdp(Some(code), None, ""), end, "{code}");
        }
        for words in [
            "[ERROR][com.freerdp.crypto] - certificate not trusted, aborting.\n[ERROR][com.freerdp.core] - ERRCONNECT",
            "[ERROR][com.freerdp.crypto] - [freerdp_tls_handshake]: certificate not trusted, aborting.",
        ] {
            assert_eq!(end_of_freerdp(Some(143), None, words), E::Certificate);
        }
    }

    #[test]
    fn death_by_sigterm_is_not_exit_code_143() {
        assert_eq!(end_of_freerdp(None, Some(15), ""), ClientEnd::Killed(15));
        assert_eq!(end_of_freerdp(Some(143), None, ""), ClientEnd::Lost);
    }
}
