// What every part of the page may use: the words of the person's language, and the launcher's actions.
import { getContext, setContext } from 'svelte';
import type { Action } from './bindings/Action';
import type { Words } from './words';

export interface Page {
  readonly words: Words;
  act(action: Action): void;
}

const key = Symbol('page');

export const provide = (page: Page): Page => setContext(key, page);
export const context = (): Page => getContext(key);
