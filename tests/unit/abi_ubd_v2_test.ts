// SPDX-License-Identifier: MIT
/**
 * The V2 dialect against its header, of which no package exists: the tables below were typed by
 * hand from `include/uapi/linux/ubd_cmd.h` of "[PATCH V2 1/1] ubd: add io_uring based userspace
 * block driver" (17 May 2022), names, values and offsets only, independently of abi/ubd_v2.ts.
 */
import assert from "node:assert/strict";
import { test } from "node:test";
import { fieldBytes, type Layout } from "../../abi/struct.ts";
import * as ubd from "../../abi/ubd_v2.ts";

const CONSTANTS = `
  UBD_CMD_GET_QUEUE_AFFINITY 1
  UBD_CMD_GET_DEV_INFO 2
  UBD_CMD_ADD_DEV 4
  UBD_CMD_DEL_DEV 5
  UBD_CMD_START_DEV 6
  UBD_CMD_STOP_DEV 7
  UBD_IO_FETCH_REQ 32
  UBD_IO_COMMIT_AND_FETCH_REQ 33
  UBD_IO_COMMIT_REQ 34
  UBD_IO_RES_OK 0
  UBD_IO_RES_ABORT -19
  UBDSRV_CMD_BUF_OFFSET 0
  UBDSRV_IO_BUF_OFFSET 2147483648
  UBD_MAX_QUEUE_DEPTH 4096
  UBD_F_SUPPORT_ZERO_COPY 0
  UBD_S_DEV_DEAD 0
  UBD_S_DEV_LIVE 1
  UBD_IO_OP_READ 0
  UBD_IO_OP_WRITE 1
  UBD_IO_OP_FLUSH 2
  UBD_IO_OP_DISCARD 3
  UBD_IO_OP_WRITE_SAME 4
  UBD_IO_OP_WRITE_ZEROES 5
  UBD_IO_F_FAILFAST_DEV 256
  UBD_IO_F_FAILFAST_TRANSPORT 512
  UBD_IO_F_FAILFAST_DRIVER 1024
  UBD_IO_F_META 2048
  UBD_IO_F_INTEGRITY 4096
  UBD_IO_F_FUA 8192
  UBD_IO_F_PREFLUSH 16384
  UBD_IO_F_NOUNMAP 32768
  UBD_IO_F_SWAP 65536
`;

/** Struct and size, then each field: offset, bytes, name. */
const STRUCTS: Record<string, [size: number, fields: string]> = {
  ubdsrv_ctrl_cmd: [32, "0 4 dev_id, 4 2 queue_id, 6 2 len, 8 8 addr, 16 16 data"],
  ubdsrv_ctrl_dev_info: [
    128,
    "0 2 nr_hw_queues, 2 2 queue_depth, 4 2 block_size, 6 2 state, 8 4 rq_max_blocks, " +
    "12 4 dev_id, 16 8 dev_blocks, 24 4 ubdsrv_pid, 28 4 reserved0, 32 16 flags, 48 80 reserved1",
  ],
  ubdsrv_io_desc: [24, "0 4 op_flags, 4 4 nr_sectors, 8 8 start_sector, 16 8 addr"],
  ubdsrv_io_cmd: [16, "0 2 q_id, 2 2 tag, 4 4 result, 8 8 addr"],
};

const SIGNED = ["ubdsrv_ctrl_dev_info.ubdsrv_pid", "ubdsrv_ctrl_dev_info.reserved0"].concat(
  "ubdsrv_io_cmd.result",
);

const exported = Object.entries(ubd) as [string, number | Layout][];

test("V2 constants are those of the header, none missing and none added", () => {
  const ours = exported.filter(([_, value]) => typeof value === "number");
  const wanted = CONSTANTS.trim().split("\n").map((line) => line.trim().split(" "));
  assert.deepEqual(
    Object.fromEntries(ours),
    Object.fromEntries(wanted.map(([name, value]) => [name, Number(value)])),
  );
});

test("V2 structs are those of the header, none missing and none added", () => {
  const ours = exported.map(([_, value]) => value).filter((value) => typeof value === "object");
  const seen = ours.map(({ name, size, fields }) => {
    const list = Object.entries(fields).map(([field, it]) =>
      `${it.offset} ${fieldBytes(it)} ${field}`
    );
    return [name, [size, list.join(", ")]];
  });
  assert.deepEqual(Object.fromEntries(seen), STRUCTS);
  const signed = ours.flatMap(({ name, fields }) =>
    Object.entries(fields).filter(([_, it]) => "type" in it && it.type === "s32")
      .map(([field]) => `${name}.${field}`)
  );
  assert.deepEqual(signed.sort(), [...SIGNED].sort());
});
