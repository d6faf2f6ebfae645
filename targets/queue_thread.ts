// SPDX-License-Identifier: MIT
/**
 * Entry of the queue threads. From source this module is the Worker's own; in a bundle its URL is
 * the program's, whose main part must do nothing in a queue thread (see cli/main.ts).
 * @module
 */

import { isQueueThread, runQueueThread } from "../core/queue_thread.ts";
import { prepareTarget } from "./mod.ts";

export const queueThreadEntry = import.meta.url;

if (isQueueThread) runQueueThread(prepareTarget);
