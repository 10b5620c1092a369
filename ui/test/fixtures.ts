// One picture of every screen, and a launcher that only remembers what it was asked.
import { render } from '@testing-library/svelte';
import { vi } from 'vitest';
import App from '../src/App.svelte';
import type { Backend, News } from '../src/backend';
import type { Message } from '../src/bindings/Message';
import type { Screen } from '../src/bindings/Screen';
import type { Settings } from '../src/bindings/Settings';
import type { StageView } from '../src/bindings/StageView';

export const languages = ['en', 'fr'] as const;

const message = (id: string): Message => ({ id, args: {} });

const stages: StageView[] = [
  { name: 'queued', status: 'done', elapsed_ms: 40 },
  { name: 'creating', status: 'done', elapsed_ms: 2100 },
  { name: 'booting', status: 'current', elapsed_ms: 6000 },
  { name: 'configuring', status: 'pending', elapsed_ms: null },
  { name: 'connecting', status: 'pending', elapsed_ms: null },
];

const failed: StageView[] = stages.map((stage) => (stage.status === 'current' ? { ...stage, status: 'failed' } : stage));

/** Every screen. The words in them are entries of the catalogue, whichever. */
export const screens = {
  home: { screen: 'home', notice: message('stage-destroying') },
  progress: {
    screen: 'progress',
    headline: message('stage-booting'),
    detail: message('detail-cloning'),
    stages,
    fraction: 0.42,
    elapsed_ms: 8140,
    expected_ms: 65_000,
    hint: message('stage-queued'),
  },
  in_use: { screen: 'in_use', headline: message('stage-connecting'), hint: null, address: '127.77.0.5:3389', client_open: false },
  countdown: { screen: 'countdown', reason: message('stage-destroying'), remaining_s: 8, total_s: 10 },
  ending: { screen: 'ending', headline: message('stage-destroying'), elapsed_ms: 900 },
  error: {
    screen: 'error',
    headline: message('stage-booting'),
    hint: message('stage-queued'),
    stages: failed,
    diagnostics: 'session 0190\nbooting: no answer',
    actions: ['retry', 'destroy', 'dismiss'],
    address: '127.77.0.5:3389',
  },
} satisfies Record<Screen['screen'], Screen>;

export const settings: Settings = {
  orchestrator: 'http://127.0.0.1:5000',
  countdown: '10s',
  language: null,
  rdp: { client: null, full_screen: false, multi_monitor: false, clipboard: true, sound: false },
};

/** The page with a launcher that shows `screen`; `tell` sends what the launcher would. */
export async function open(screen: Screen, language: string = 'en') {
  let listener: (news: News) => void = () => {};
  const backend = {
    subscribe: vi.fn<Backend['subscribe']>(async (listen) => {
      listener = listen;
    }),
    act: vi.fn<Backend['act']>(async () => {}),
    settings: vi.fn<Backend['settings']>(async () => structuredClone(settings)),
    saveSettings: vi.fn<Backend['saveSettings']>(async () => {}),
  };
  const page = render(App, { backend });
  const settle = () => new Promise((resolve) => setTimeout(resolve, 0));
  async function tell(news: News) {
    listener(news);
    await settle();
  }
  const show = (next: Screen) => tell({ news: 'view', view: { screen: next, language, secrets_notice: null } });
  await show(screen);
  const button = (name: string) => page.container.querySelector<HTMLButtonElement>(`[data-action="${name}"]`);
  return { ...page, backend, tell, show, settle, button };
}
