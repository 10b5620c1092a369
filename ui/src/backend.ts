// The launcher as the page sees it. Nothing else in the page talks to the outside: a test gives another `Backend`.
import { Channel, invoke } from '@tauri-apps/api/core';
import type { Action } from './bindings/Action';
import type { Settings } from './bindings/Settings';
import type { View } from './bindings/View';

/** What the launcher sends to an open window: first a whole view, then whatever changed. `News` in `src-tauri`. */
export type News = { news: 'view'; view: View } | { news: 'page'; page: 'main' | 'settings' };

export interface Backend {
  /** Calls `listen` with the picture of now, then after every change. */
  subscribe(listen: (news: News) => void): Promise<void>;
  /** Does what a button says. */
  act(action: Action): Promise<void>;
  settings(): Promise<Settings>;
  /** Rejects with a `Message` when the launcher refuses them. */
  saveSettings(settings: Settings): Promise<void>;
}

export const tauri: Backend = {
  subscribe: (listen) => invoke('subscribe', { channel: new Channel<News>(listen) }),
  act: (action) => invoke('act', { action }),
  settings: () => invoke('settings'),
  saveSettings: (settings) => invoke('save_settings', { settings }),
};
