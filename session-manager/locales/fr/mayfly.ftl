### Tous les mots que Mayfly affiche, en français. Mêmes entrées que l'anglais.

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

## Étapes de la création d'un bureau

stage-queued = En attente d'une place
stage-creating = Création de la machine
stage-booting = Démarrage de la machine
stage-configuring = Préparation de votre bureau
stage-connecting = Vérification de la connexion
stage-destroying = Destruction du bureau

## Les fenêtres

window-home-title = Un bureau neuf, à la demande
window-home-text = Un bureau Linux tout propre, fait pour vous, qui disparaît quand vous le fermez.
window-progress = Avancement
window-details = Détails
window-expected = d'habitude environ { $time }
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
window-copy-refused = Copie refusée : sélectionnez le texte.
window-diagnostics = Diagnostic
window-seconds-left = { $seconds ->
    [one] { $seconds } seconde restante
   *[other] { $seconds } secondes restantes
}
window-countdown-text = Ensuite, le bureau est détruit avec tout ce qui y est enregistré.
window-countdown-never = Le bureau reste jusqu'à votre décision, dans la limite fixée par votre administrateur.
window-countdown-keys = Entrée : se reconnecter. Échap : garder le bureau.
window-destroy-now = Détruire maintenant

## Réglages

settings-title = Réglages
settings-orchestrator = Adresse de l'orchestrateur
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
