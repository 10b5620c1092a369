### Every word that Mayfly shows, in English. The French one has the same entries.

app-name = Mayfly

## Actions: buttons and menu items

action-new-desktop = New desktop
action-cancel = Cancel
action-reconnect = Reconnect
action-keep = Keep it
action-destroy = Destroy the desktop
action-retry = Try again
action-dismiss = Close
action-open-window = Open Mayfly
action-open-settings = Settings…

## Steps of making a desktop

stage-queued = Waiting for a place
stage-creating = Creating the machine
stage-booting = Starting the machine
stage-configuring = Preparing your desktop
stage-connecting = Checking the connection
stage-destroying = Destroying the desktop

## The windows

window-home-title = A fresh desktop, whenever you ask
window-home-text = A clean Linux desktop made for you, and gone when you close it.
window-progress = Progress
window-details = Details
window-expected = usually about { $time }
window-instant = < 1 s
window-seconds = { $seconds } s
window-minutes = { $minutes } min { $seconds } s
window-stage-pending = not begun
window-stage-current = under way
window-stage-done = done
window-stage-failed = failed
window-lost = Destroying it deletes everything saved inside.
window-address = To connect by hand, open your RDP client at
window-copy-address = Copy
window-copy-diagnostics = Copy diagnostics
window-copied = Copied
window-copy-refused = Copying was refused: select the text instead.
window-diagnostics = Diagnostics
window-seconds-left = { $seconds ->
    [one] { $seconds } second left
   *[other] { $seconds } seconds left
}
window-countdown-text = Then the desktop is destroyed, with everything saved inside.
window-countdown-never = The desktop stays until you decide, as long as your administrator allows.
window-countdown-keys = Enter reconnects, Esc keeps the desktop.
window-destroy-now = Destroy now

## Settings

settings-title = Settings
settings-orchestrator = Orchestrator address
settings-countdown = When the RDP client is closed, destroy the desktop
settings-countdown-10s = after 10 seconds
settings-countdown-30s = after 30 seconds
settings-countdown-2min = after 2 minutes
settings-countdown-never = only when I ask
settings-language = Language
settings-language-system = As the system
settings-language-en = English
settings-language-fr = Français
settings-rdp = Remote desktop
settings-rdp-client = RDP client
settings-rdp-client-auto = the best one found
settings-rdp-full-screen = Full screen
settings-rdp-multi-monitor = Use all monitors
settings-rdp-clipboard = Share the clipboard
settings-rdp-sound = Play sound here
settings-back = Back
settings-save = Save
