//! Words of the catalogue.
use mayfly_session_manager::view::Message;
pub(crate) fn text(_language: &str, message: &Message) -> String {
    message.id.clone()
}
pub(crate) fn say(_language: &str, id: &str) -> String {
    id.to_owned()
}
