// SPDX-License-Identifier: MIT
/** kernelFindings: which kernels ubd doctor warns of. */
import assert from "node:assert/strict";
import { test } from "node:test";
import { UBD_V2, UBLK } from "../../abi/dialect.ts";
import { driverFinding, kernelFindings } from "../../cli/doctor.ts";

/** Without what only other programs do. */
const levels = (kernel: string, outer = true) =>
  kernelFindings(kernel, outer).map(({ level }) => level).filter((level) => level !== "note");

test("kernelFindings knows nothing against kernels that are good", () => {
  for (
    const kernel of [
      ...["6.1.0-41-amd64", "6.6.87", "6.14.6", "6.15.11", "6.1.160", "7.0.1"],
      ...["7.2.13+deb14-amd64", "7.10.0"],
    ]
  ) {
    assert.deepStrictEqual(levels(kernel), ["ok"], kernel);
    assert.match(kernelFindings(kernel, true)[0]!.what, /, no known bug$/);
  }
});

test("kernelFindings notes what only other programs do to a kernel", () => {
  const RESIZING = /resizing a device that is not LIVE/;
  for (const kernel of ["6.16-rc1", "6.17.13-azure", "6.18.0", "6.18.6", "6.18.44-x", "6.19.5"]) {
    const [, { level, what } = { level: "", what: "" }, ...more] = kernelFindings(kernel, true);
    assert.deepStrictEqual([level, more], ["note", []], kernel);
    assert.match(what, RESIZING);
  }
  const ofRc = (rc: number) => kernelFindings(`7.0.0-rc${rc}`, true).map(({ what }) => what).join();
  assert.match(ofRc(3), RESIZING);
  assert.doesNotMatch(ofRc(4), RESIZING);
});

test("kernelFindings calls it a problem where no device can be added", () => {
  for (const kernel of ["5.15.0-101-generic", "6.0.19", "4.4"]) {
    assert.deepStrictEqual(levels(kernel), ["problem"], kernel);
  }
  for (const kernel of ["6.18.4", "6.18.5-arch1-1", "6.18.4-arch1-1"]) {
    assert.deepStrictEqual(levels(kernel), ["ok", "problem"], kernel);
  }
  assert.deepStrictEqual(levels("6.17.0-1015-azure"), ["ok", "problem", "warning"]);
  assert.deepStrictEqual(levels("6.17.0-5-generic", false), ["ok", "warning", "problem"]);
});

test("kernelFindings warns of kernels that can crash or wedge, and says what to do", () => {
  for (
    const [kernel, what] of [
      ["6.8.0-45-generic", /CVE-2025-37906/],
      ["6.12.57+deb13-amd64", /CVE-2025-37906/],
      ["6.14.5", /CVE-2025-37906/],
      ["6.18.40", /wedge/],
      ["7.0.14-x", /wedge/],
      ["6.17.0-5-generic", /stuck processes/],
    ] as const
  ) {
    const [, finding, ...more] = kernelFindings(kernel, true)
      .filter(({ level }) => level !== "note");
    assert.deepStrictEqual([finding?.level, more], ["warning", []], kernel);
    assert.match(finding!.what, what);
    assert.ok(finding!.why && finding!.mend);
  }
  assert.deepStrictEqual(levels("6.7.3"), ["ok", "warning", "warning"]);
});

test("of another driver than the kernel's own, the kernel's bugs are not told, but what it lacks", () => {
  assert.deepStrictEqual(kernelFindings("6.18.4", true, UBD_V2).map(({ level }) => level), ["ok"]);
  assert.deepStrictEqual(kernelFindings("5.15", true, UBD_V2)[0]!.level, "problem");
  const { level, what, why, mend } = driverFinding(UBD_V2);
  assert.strictEqual(level, "note");
  assert.match(what, /^ubd_drv is there/);
  assert.match(why!, /no recovery/);
  assert.strictEqual(mend, "rmmod ubd_drv; modprobe ublk_drv");
  assert.deepStrictEqual(driverFinding(UBLK), {
    check: "driver",
    level: "ok",
    what: "ublk_drv is there",
  });
});
