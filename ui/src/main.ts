// Starts the page: one component, fed by the launcher.
import { mount } from 'svelte';
import App from './App.svelte';
import { tauri } from './backend';
import './app.css';

const target = document.getElementById('app');
if (target) mount(App, { target, props: { backend: tauri } });
