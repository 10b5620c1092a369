//! What was checked to be gone of desktops ([`crate::receipt`]), as it is kept.
//!
//! # Guarantees
//! Of a desktop that was checked more than once the last check is kept; it is forgotten with its session.

use super::sqlite::{SqliteStore, parse};
use super::words::Whose;
use super::{StoreError, unreadable};
use async_trait::async_trait;
use mayfly_api::{Removal, SessionId};

/// See the module.
#[async_trait]
pub trait Receipts: Send + Sync + 'static {
    /// Keeps what was checked of a desktop of that session.
    async fn keep_receipt(&self, session: SessionId, removal: &Removal) -> Result<(), StoreError>;

    /// What is kept, the earliest desktop's first.
    async fn receipts(&self, whose: Whose) -> Result<Vec<(SessionId, Removal)>, StoreError>;
}

#[async_trait]
impl Receipts for SqliteStore {
    async fn keep_receipt(&self, session: SessionId, removal: &Removal) -> Result<(), StoreError> {
        sqlx::query(
            "INSERT INTO receipt (number, session_id, body) VALUES (?, ?, ?)
             ON CONFLICT (number) DO UPDATE SET body = excluded.body",
        )
        .bind(removal.desktop.number())
        .bind(session.to_string())
        .bind(serde_json::to_string(removal).map_err(unreadable)?)
        .execute(&self.writer)
        .await?;
        Ok(())
    }

    async fn receipts(&self, whose: Whose) -> Result<Vec<(SessionId, Removal)>, StoreError> {
        let (session, number) = match whose {
            Whose::Session(id) => (Some(id.to_string()), None),
            Whose::Desktop(name) => (None, Some(name.number())),
        };
        let rows: Vec<(String, String)> = sqlx::query_as(
            "SELECT session_id, body FROM receipt WHERE session_id = ? OR number = ? ORDER BY number",
        )
        .bind(session)
        .bind(number)
        .fetch_all(&self.readers)
        .await?;
        rows.into_iter()
            .map(|(session, body)| {
                let removal = serde_json::from_str(&body).map_err(|_| unreadable(body))?;
                Ok((parse(&session)?, removal))
            })
            .collect()
    }
}
