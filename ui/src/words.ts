// Words in the person's language, from the catalogue that the whole launcher shares.
import { FluentBundle, FluentResource } from '@fluent/bundle';
import en from '../../session-manager/locales/en/mayfly.ftl?raw';
import fr from '../../session-manager/locales/fr/mayfly.ftl?raw';
import type { Message } from './bindings/Message';

export type Args = Record<string, string | number>;

/** Looks words up in one language. */
export interface Words {
  language: string;
  /** The words of a catalogue entry. */
  say(id: string, args?: Args): string;
  /** The words of what the launcher sent. */
  tell(message: Message): string;
  /** A duration, such as "8 s" or "1 min 05 s". */
  time(milliseconds: number): string;
}

const catalogues = { en, fr };

/** The words of a language; English for any that has no catalogue. */
export function words(language: string): Words {
  const known = language === 'fr' ? 'fr' : 'en';
  const bundle = new FluentBundle(known, { useIsolating: false });
  bundle.addResource(new FluentResource(catalogues[known]));

  function say(id: string, args: Args = {}): string {
    const pattern = bundle.getMessage(id)?.value;
    // An entry that is missing shows its name: ugly, seen at once, and better than an empty button.
    return pattern ? bundle.formatPattern(pattern, args, []) : id;
  }

  return {
    language: known,
    say,
    tell: (message) => say(message.id, message.args as Args),
    time(milliseconds) {
      const total = Math.max(0, Math.floor(milliseconds / 1000));
      if (total < 60) return say('window-seconds', { seconds: total });
      const seconds = String(total % 60).padStart(2, '0');
      return say('window-minutes', { minutes: Math.floor(total / 60), seconds });
    },
  };
}

/** The catalogue entry of a button. */
export function label(action: string): string {
  return `action-${action.replaceAll('_', '-')}`;
}
