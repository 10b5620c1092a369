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

## What a step is at

detail-no-room = There is no room for another desktop at the moment
detail-anew-interrupted = Starting over: it was interrupted
detail-anew-in-the-way = Starting over: something was in the way
detail-anew-too-long = Starting over: it took too long
detail-storage =
    { $place ->
        [one] Waiting for the storage, next in line
       *[other] Waiting for the storage, number { $place } in line
    }
detail-cloning = Copying the template
detail-address = Waiting for its network address
detail-first-boot = Starting for the first time
detail-task = Task { $number }: { $name }

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
settings-not-an-address = “{ $address }” is not an orchestrator address such as http://127.0.0.1:5000.
settings-not-saved = The settings cannot be saved: { $reason }

## On the way

progress-checking = Looking for your RDP client
progress-asking = Asking for a desktop
progress-opening = Opening your RDP client

hint-queue =
    { $place ->
        [one] You are next in line.
       *[other] You are number { $place } in line.
    }
hint-longer = This is taking longer than usual.
hint-no-answer = The orchestrator at { $address } does not answer. Trying again…

## A desktop lives

in-use = { $desktop } is open
in-use-by-hand = Somebody is connected to { $desktop }
held-kept = Your desktop is kept
held-lost = The connection was lost; your desktop is still there
held-crashed = Your RDP client stopped unexpectedly; your desktop is still there
held-replaced = Another connection took over your desktop
held-disconnected = Nobody is connected to your desktop any more
held-recovered = Your desktop from before is still there
hint-kept-until = It is kept for you while Mayfly runs, until { $time } at the latest.
hint-ends-at = It will be destroyed at { $time } unless you reconnect.

reason-closed = You closed your desktop
reason-logged-off = You logged off
reason-timed-out = Your desktop was closed because nothing happened in it

ending-destroying = Destroying your desktop
ending-cancelled = Cancelling
ending-quitting = Destroying your desktop before leaving

## What just happened

notice-looking = Looking for a desktop from before…
notice-destroyed = Your desktop was destroyed.
notice-cancelled = Cancelled. Nothing is left.
notice-requested = Your desktop was destroyed on request.
notice-idle = Your desktop was destroyed because nobody was connected to it.
notice-never-connected = Your desktop was destroyed because nobody ever connected to it.
notice-abandoned = Your desktop was destroyed because Mayfly was not heard from.
notice-expired = Your desktop reached its longest lifetime and was destroyed.
notice-machine-lost = Your desktop stopped by itself. What was left of it was destroyed.
notice-failed = Your desktop could not be made. What was made of it was destroyed.
notice-gone = Your desktop is gone: the orchestrator does not know it any more.
notice-ended-meanwhile = Your desktop from before was destroyed in the meantime.
notice-secret-lost = A desktop from before cannot be reached any more: its key was only in memory. The orchestrator destroys it by itself. For the administrator: session { $session }.
notice-left-behind = A desktop may still be there; the orchestrator destroys it by itself. For the administrator: session { $session }.

secrets-in-memory = The keyring cannot be used, so the key of your desktop is kept in memory only: after a crash, Mayfly could not find it again. Reason: { $reason }

## Failures: what failed, then what to do

error-unreachable = The orchestrator cannot be reached
error-unreachable-hint = Nothing answers at { $address }. Check that the address in the settings is right, that the orchestrator is running, and that this machine is on the network.
error-not-an-orchestrator = This is not a Mayfly orchestrator
error-not-an-orchestrator-hint = What answers at { $address } does not speak Mayfly. Check the address in the settings.
error-no-capacity = There is no room for another desktop now
error-provider = Desktops cannot be made now
error-shutting-down = The orchestrator is stopping
error-refused = The orchestrator refused
error-refused-hint = It says: { $detail }
error-prepare = The desktop could not be made
error-prepare-hint = Nothing is left of it. The orchestrator says: { $detail }
error-no-client = No RDP client was found
error-no-client-hint = Install FreeRDP (the package freerdp3-sdl, freerdp3-x11 or freerdp2-x11), or name your client in the settings.
error-no-client-hint-macos = Install FreeRDP (brew install freerdp) or Microsoft’s Windows App, or name your client in the settings.
error-client-start = Your RDP client cannot be started
error-client-start-hint = { $client } cannot be used: { $reason }. Put that right, or choose another client in the settings.
error-client-failed = Your RDP client stopped with an error
error-client-failed-hint = Your desktop is still there. Try again, or connect by hand to the address below.
error-connect = Your RDP client could not connect
error-connect-hint = Your desktop is still there. Check the network and try again, or connect by hand to the address below.
error-login = The desktop refused the login
error-login-hint = Your desktop is still there. Try again; if it happens again, destroy it and ask for a new one.
error-certificate = This is not the desktop that was announced
error-certificate-hint = Its certificate is not the one that the orchestrator gave, so no connection was made and no password was sent. Destroy this desktop. If it happens again, tell your administrator.
error-credentials = The login for the desktop could not be fetched
error-credentials-hint = Your desktop is still there. Try again in a moment.
error-destroy = The desktop could not be destroyed
error-destroy-hint = The orchestrator keeps trying by its own rules. For the administrator: session { $session }.
error-recover = A desktop from before may still be there
error-recover-hint = The orchestrator at { $address } did not answer. Try again, or leave the desktop to the orchestrator, which destroys it by itself.
error-settings = The settings file cannot be used
error-settings-hint = Until it is corrected, the usual settings are in force. { $reason }

## Tray menu

menu-no-desktop = No desktop
menu-preparing = A desktop is on its way
menu-countdown = Your desktop is about to be destroyed
menu-quit = Quit
menu-quit-cancel = Cancel and quit
menu-quit-destroy = Destroy the desktop and quit

## Notifications

notify-ready = Your desktop is ready
notify-ready-body = Your RDP client is opening. Everything in the desktop is lost when it is destroyed.
notify-countdown-body =
    { $seconds ->
        [one] It will be destroyed in { $seconds } second.
       *[other] It will be destroyed in { $seconds } seconds.
    }
notify-never-body = It stays until you decide.
notify-held-body = Open Mayfly to reconnect or to destroy it.
notify-disconnected-body = It will be destroyed soon unless you reconnect.
notify-ending-body = What is in it is lost.
notify-ended-body = What was in it is lost.
notify-expiring =
    { $minutes ->
        [one] Your desktop ends in { $minutes } minute
       *[other] Your desktop ends in { $minutes } minutes
    }
notify-expiring-body = Save your work elsewhere: what is in the desktop is lost then.

## Terminal

cli-countdown =
    { $seconds ->
        [one] destroyed in { $seconds } second
       *[other] destroyed in { $seconds } seconds
    }
cli-kept = kept until you decide
cli-keys-countdown = r reconnect · k keep · d destroy now
cli-keys-held = r reconnect · d destroy now
cli-address = To connect by hand: { $address }
cli-expected = usually { $seconds } s
cli-stopping = Destroying; press Ctrl-C again to leave at once.
cli-left-behind = Left without an answer. The orchestrator ends session { $session } by its own rules.
cli-left-behind-unknown = Left without an answer. If a session was made, the orchestrator ends it by its own rules.
cli-acknowledged = The orchestrator is destroying session { $session }.
