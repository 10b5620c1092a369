### Tous les mots que Mayfly affiche, en français. Mêmes entrées que l’anglais.

app-name = Mayfly

## Actions : boutons et entrées de menu

action-new-desktop = Nouveau bureau
action-cancel = Annuler
action-reconnect = Se reconnecter
action-keep = Le garder
action-destroy = Détruire le bureau
action-retry = Réessayer
action-dismiss = Fermer
action-open-window = Ouvrir Mayfly
action-open-settings = Réglages…

## Étapes de la création d’un bureau

stage-queued = En attente d’une place
stage-creating = Création de la machine
stage-booting = Démarrage de la machine
stage-configuring = Préparation de votre bureau
stage-connecting = Vérification de la connexion
stage-destroying = Destruction du bureau

## Où en est une étape

detail-no-room = Il n’y a pas de place pour un autre bureau en ce moment
detail-anew-interrupted = Nouvel essai : le premier a été interrompu
detail-anew-in-the-way = Nouvel essai : quelque chose gênait le premier
detail-anew-too-long = Nouvel essai : le premier durait trop longtemps
detail-storage =
    { $place ->
        [one] En attente du stockage, premier de la file
       *[other] En attente du stockage, numéro { $place } dans la file
    }
detail-cloning = Copie du modèle
detail-address = En attente de son adresse réseau
detail-first-boot = Premier démarrage
detail-task = Tâche { $number } : { $name }

## Les fenêtres

window-home-title = Un bureau neuf, à la demande
window-home-text = Un bureau Linux tout propre, fait pour vous, qui disparaît quand vous le fermez.
window-progress = Avancement
window-details = Détails
window-expected = d’habitude environ { $time }
window-instant = < 1 s
window-seconds = { $seconds } s
window-minutes = { $minutes } min { $seconds } s
window-stage-pending = pas commencé
window-stage-current = en cours
window-stage-done = fait
window-stage-failed = échec
window-lost = Le détruire efface tout ce qui y est enregistré.
window-address = Pour vous connecter à la main, ouvrez votre client RDP sur
window-copy-address = Copier
window-copy-diagnostics = Copier le diagnostic
window-copied = Copié
window-copy-refused = Copie refusée : sélectionnez le texte.
window-diagnostics = Diagnostic
window-seconds-left = { $seconds ->
    [one] { $seconds } seconde restante
   *[other] { $seconds } secondes restantes
}
window-countdown-text = Ensuite, le bureau est détruit avec tout ce qui y est enregistré.
window-countdown-never = Le bureau reste jusqu’à votre décision, dans la limite fixée par votre administrateur.
window-countdown-keys = Entrée : se reconnecter. Échap : garder le bureau.
window-destroy-now = Détruire maintenant

## Réglages

settings-title = Réglages
settings-orchestrator = Adresse de l’orchestrateur
settings-countdown = À la fermeture du client RDP, détruire le bureau
settings-countdown-10s = après 10 secondes
settings-countdown-30s = après 30 secondes
settings-countdown-2min = après 2 minutes
settings-countdown-never = seulement à ma demande
settings-language = Langue
settings-language-system = Celle du système
settings-language-en = English
settings-language-fr = Français
settings-rdp = Bureau à distance
settings-rdp-client = Client RDP
settings-rdp-client-auto = le meilleur trouvé
settings-rdp-full-screen = Plein écran
settings-rdp-multi-monitor = Utiliser tous les écrans
settings-rdp-clipboard = Partager le presse-papiers
settings-rdp-sound = Jouer le son ici
settings-back = Retour
settings-save = Enregistrer
settings-not-an-address = « { $address } » n’est pas une adresse d’orchestrateur telle que http://127.0.0.1:5000.
settings-not-saved = Les réglages ne peuvent pas être enregistrés : { $reason }

## En chemin

progress-checking = Recherche de votre client RDP
progress-asking = Demande d’un bureau
progress-opening = Ouverture de votre client RDP

hint-queue =
    { $place ->
        [one] Vous êtes le prochain dans la file.
       *[other] Vous êtes numéro { $place } dans la file.
    }
hint-longer = C’est plus long que d’habitude.
hint-no-answer = L’orchestrateur à l’adresse { $address } ne répond pas. Nouvel essai…

## Un bureau existe

in-use = { $desktop } est ouvert
in-use-by-hand = Quelqu’un est connecté à { $desktop }
held-kept = Votre bureau est conservé
held-lost = La connexion est perdue ; votre bureau est toujours là
held-crashed = Votre client RDP s’est arrêté de façon inattendue ; votre bureau est toujours là
held-replaced = Une autre connexion a pris la main sur votre bureau
held-disconnected = Plus personne n’est connecté à votre bureau
held-recovered = Votre bureau précédent est toujours là
hint-kept-until = Il est conservé tant que Mayfly tourne, jusqu’à { $time } au plus tard.
hint-ends-at = Il sera détruit à { $time }, sauf si vous vous reconnectez.

reason-closed = Vous avez fermé votre bureau
reason-logged-off = Vous vous êtes déconnecté
reason-timed-out = Votre bureau a été fermé faute d’activité

ending-destroying = Destruction de votre bureau
ending-cancelled = Annulation
ending-quitting = Destruction de votre bureau avant de quitter

## Ce qui vient d’arriver

notice-looking = Recherche d’un bureau précédent…
notice-destroyed = Votre bureau a été détruit.
notice-cancelled = Annulé. Il ne reste rien.
notice-requested = Votre bureau a été détruit sur demande.
notice-idle = Votre bureau a été détruit, car personne n’y était connecté.
notice-never-connected = Votre bureau a été détruit, car personne ne s’y est jamais connecté.
notice-abandoned = Votre bureau a été détruit, car Mayfly ne donnait plus signe de vie.
notice-expired = Votre bureau a atteint sa durée de vie maximale et a été détruit.
notice-machine-lost = Votre bureau s’est arrêté de lui-même. Ce qu’il en restait a été détruit.
notice-failed = Votre bureau n’a pas pu être créé. Ce qui en existait a été détruit.
notice-gone = Votre bureau n’existe plus : l’orchestrateur ne le connaît plus.
notice-ended-meanwhile = Votre bureau précédent a été détruit entre-temps.
notice-secret-lost = Un bureau précédent n’est plus accessible : sa clé n’était qu’en mémoire. L’orchestrateur le détruit de lui-même. Pour l’administrateur : session { $session }.
notice-left-behind = Un bureau existe peut-être encore ; l’orchestrateur le détruit de lui-même. Pour l’administrateur : session { $session }.

secrets-in-memory = Le trousseau de clés est inutilisable ; la clé de votre bureau n’est donc gardée qu’en mémoire : après un plantage, Mayfly ne pourrait pas le retrouver. Raison : { $reason }

## Échecs : ce qui a échoué, puis que faire

error-unreachable = L’orchestrateur est injoignable
error-unreachable-hint = Rien ne répond à l’adresse { $address }. Vérifiez que l’adresse dans les réglages est juste, que l’orchestrateur tourne et que cette machine est reliée au réseau.
error-not-an-orchestrator = Ce n’est pas un orchestrateur Mayfly
error-not-an-orchestrator-hint = Ce qui répond à l’adresse { $address } ne parle pas Mayfly. Vérifiez l’adresse dans les réglages.
error-no-capacity = Il n’y a pas de place pour un autre bureau en ce moment
error-provider = Aucun bureau ne peut être créé en ce moment
error-shutting-down = L’orchestrateur est en train de s’arrêter
error-refused = L’orchestrateur a refusé
error-refused-hint = Il répond : { $detail }
error-prepare = Le bureau n’a pas pu être créé
error-prepare-hint = Il n’en reste rien. L’orchestrateur répond : { $detail }
error-no-client = Aucun client RDP n’a été trouvé
error-no-client-hint = Installez FreeRDP (paquet freerdp3-sdl, freerdp3-x11 ou freerdp2-x11), ou indiquez votre client dans les réglages.
error-no-client-hint-macos = Installez FreeRDP (brew install freerdp) ou l’application Windows App de Microsoft, ou indiquez votre client dans les réglages.
error-client-start = Votre client RDP ne peut pas démarrer
error-client-start-hint = { $client } est inutilisable : { $reason }. Corrigez cela, ou choisissez un autre client dans les réglages.
error-client-failed = Votre client RDP s’est arrêté sur une erreur
error-client-failed-hint = Votre bureau est toujours là. Réessayez, ou connectez-vous à la main à l’adresse ci-dessous.
error-connect = Votre client RDP n’a pas pu se connecter
error-connect-hint = Votre bureau est toujours là. Vérifiez le réseau et réessayez, ou connectez-vous à la main à l’adresse ci-dessous.
error-login = Le bureau a refusé l’ouverture de session
error-login-hint = Votre bureau est toujours là. Réessayez ; si cela se reproduit, détruisez-le et demandez-en un nouveau.
error-certificate = Ce n’est pas le bureau annoncé
error-certificate-hint = Son certificat n’est pas celui que l’orchestrateur a donné : aucune connexion n’a été établie et aucun mot de passe envoyé. Détruisez ce bureau. Si cela se reproduit, prévenez votre administrateur.
error-credentials = Les identifiants du bureau n’ont pas pu être obtenus
error-credentials-hint = Votre bureau est toujours là. Réessayez dans un instant.
error-destroy = Le bureau n’a pas pu être détruit
error-destroy-hint = L’orchestrateur continue d’essayer selon ses propres règles. Pour l’administrateur : session { $session }.
error-recover = Un bureau précédent existe peut-être encore
error-recover-hint = L’orchestrateur à l’adresse { $address } n’a pas répondu. Réessayez, ou laissez le bureau à l’orchestrateur, qui le détruit de lui-même.
error-settings = Le fichier de réglages est inutilisable
error-settings-hint = Tant qu’il n’est pas corrigé, les réglages habituels s’appliquent. { $reason }

## Menu de la barre système

menu-no-desktop = Aucun bureau
menu-preparing = Un bureau arrive
menu-countdown = Votre bureau va être détruit
menu-quit = Quitter
menu-quit-cancel = Annuler et quitter
menu-quit-destroy = Détruire le bureau et quitter

## Notifications

notify-ready = Votre bureau est prêt
notify-ready-body = Votre client RDP s’ouvre. Tout ce que contient le bureau est perdu quand il est détruit.
notify-countdown-body =
    { $seconds ->
        [one] Il sera détruit dans { $seconds } seconde.
       *[other] Il sera détruit dans { $seconds } secondes.
    }
notify-never-body = Il reste là jusqu’à ce que vous décidiez.
notify-held-body = Ouvrez Mayfly pour vous reconnecter ou pour le détruire.
notify-disconnected-body = Il sera bientôt détruit, sauf si vous vous reconnectez.
notify-ending-body = Ce qu’il contient est perdu.
notify-ended-body = Ce qu’il contenait est perdu.
notify-expiring =
    { $minutes ->
        [one] Votre bureau prend fin dans { $minutes } minute
       *[other] Votre bureau prend fin dans { $minutes } minutes
    }
notify-expiring-body = Enregistrez votre travail ailleurs : ce que contient le bureau sera alors perdu.

## Terminal

cli-countdown =
    { $seconds ->
        [one] détruit dans { $seconds } seconde
       *[other] détruit dans { $seconds } secondes
    }
cli-kept = conservé jusqu’à votre décision
cli-keys-countdown = r se reconnecter · k conserver · d détruire maintenant
cli-keys-held = r se reconnecter · d détruire maintenant
cli-address = Pour se connecter à la main : { $address }
cli-expected = d’habitude { $seconds } s
cli-stopping = Destruction en cours ; Ctrl-C encore une fois pour partir aussitôt.
cli-left-behind = Parti sans réponse. L’orchestrateur termine la session { $session } selon ses propres règles.
cli-left-behind-unknown = Parti sans réponse. Si une session a été créée, l’orchestrateur la termine selon ses propres règles.
cli-acknowledged = L’orchestrateur détruit la session { $session }.
