// What a screen reader is told, through one region that never leaves the page (WCAG 4.1.3).
import type { Screen } from './bindings/Screen';
import type { Words } from './words';

/**
 * One text per state worth a word; it stays the same while only a clock moves, so that nothing is said twice.
 * A countdown is said at its start and at 10, 5 and 0 seconds: a clock that talks every second is noise.
 */
export function announcement(screen: Screen, words: Words): string {
  switch (screen.screen) {
    case 'home':
      return screen.notice ? words.tell(screen.notice) : '';
    case 'progress': {
      // A playbook's tasks come by the dozen; where they are is to be read, and the headline says what goes on.
      const detail = screen.detail?.id === 'detail-task' ? null : screen.detail;
      return [screen.headline, detail, screen.hint].flatMap((m) => (m ? [words.tell(m)] : [])).join(' ');
    }
    case 'in_use':
      return [screen.headline, screen.hint].flatMap((m) => (m ? [words.tell(m)] : [])).join(' ');
    case 'countdown': {
      const left = screen.remaining_s;
      if (left === null || left > 10) return words.tell(screen.reason);
      const said = left > 5 ? 10 : left > 0 ? 5 : 0;
      return words.say('window-seconds-left', { seconds: said });
    }
    case 'ending':
      return words.tell(screen.headline);
    case 'error':
      return `${words.tell(screen.headline)} ${words.tell(screen.hint)}`;
  }
}
