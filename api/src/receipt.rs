//! What was checked to be gone when a session's desktops were removed.

use crate::{DesktopName, SessionId};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// Answer to `GET /api/v1/sessions/{id}/receipt`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Receipt {
    /// The session.
    pub session: SessionId,
    /// Its desktops, the first one first: more than one if one could not be made; none if it ended before there was any.
    pub removals: Vec<Removal>,
}

/// One desktop's end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Removal {
    /// The desktop.
    pub desktop: DesktopName,
    /// The program and the machine that removed it.
    pub by: String,
    /// What was looked for and not found, in order.
    pub checked: Vec<Absence>,
}

/// Something that was looked for and not found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Absence {
    /// What, in a word or two: `machine`, `disk`, `account`, `terraform state`, `secrets`.
    pub what: String,
    /// Where it was looked for.
    pub place: String,
    /// The part that looked: a provider, `domain`, `ansible`, `orchestrator`, or an administrator's word.
    pub by: String,
    /// When.
    #[cfg_attr(feature = "openapi", schema(value_type = String, format = DateTime))]
    pub checked_at: Timestamp,
}
