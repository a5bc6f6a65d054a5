// Type-checks dashboards against @grafana/schema, whose only form is TypeScript.
//
//   npm install && node check.mjs ../dashboards/kvthrift.json
//
// Exit status 1, and TypeScript's words, if one is not what Grafana 10.4 or newer reads.
import {readFileSync, writeFileSync, mkdtempSync, rmSync} from "node:fs";
import {dirname, join, resolve} from "node:path";
import {fileURLToPath} from "node:url";
import ts from "typescript";

const here = dirname(fileURLToPath(import.meta.url));
const panelOptions = {timeseries: "TimeSeries", stat: "Stat"};

// JSON has the values of enums, not their names; a value of the wrong kind still fails.
const prelude = `
import type {Dashboard} from "@grafana/schema/dist/esm/raw/dashboard/x/dashboard_types.gen";
import type {GraphFieldConfig} from "@grafana/schema";
type Plain<T> = T extends string ? \`\${T}\` : T extends object ? {[K in keyof T]: Plain<T[K]>} : T;
// What the Prometheus data source adds to an annotation; the schema leaves that to data sources.
type Prometheus = {expr?: string; step?: string; titleFormat?: string; textFormat?: string};
type Base = Plain<Dashboard>;
type Annotation = NonNullable<NonNullable<Base["annotations"]>["list"]>[number] & Prometheus;
type Checked = Omit<Base, "annotations"> & {annotations?: {list?: Annotation[]}};
type Partly<T> = T extends object ? {[K in keyof T]?: Partly<T[K]>} : T;
`;

function source(file) {
  const dashboard = JSON.parse(readFileSync(file, "utf8"));
  const lines = [prelude, `const d: Checked = ${JSON.stringify(dashboard, null, 1)};`];
  for (const panel of dashboard.panels ?? []) {
    const name = panelOptions[panel.type];
    if (panel.type !== "row" && !name) lines.push(`const unknown_${panel.id}: never = "panel type ${panel.type}";`);
    if (!name) continue;
    const module = `@grafana/schema/dist/esm/raw/composable/${panel.type}/panelcfg/x/${name}PanelCfg_types.gen`;
    lines.push(`const o${panel.id}: Plain<import("${module}").Options> = ${JSON.stringify(panel.options)};`);
    const custom = panel.fieldConfig?.defaults?.custom;
    if (custom) lines.push(`const c${panel.id}: Partly<Plain<GraphFieldConfig>> = ${JSON.stringify(custom)};`);
  }
  lines.push("export {};");
  return lines.join("\n");
}

function problems(file) {
  const folder = mkdtempSync(join(here, "check-"));
  try {
    const path = join(folder, "dashboard.ts");
    writeFileSync(path, source(resolve(file)));
    const options = {strict: true, noEmit: true, skipLibCheck: true, moduleResolution: ts.ModuleResolutionKind.Node10, types: []};
    const found = ts.getPreEmitDiagnostics(ts.createProgram([path], options));
    return found.map((d) => ts.flattenDiagnosticMessageText(d.messageText, "\n"));
  } finally {
    rmSync(folder, {recursive: true});
  }
}

let bad = 0;
for (const file of process.argv.slice(2)) {
  for (const text of problems(file)) {
    console.error(`${file}: ${text}`);
    bad = 1;
  }
}
process.exit(bad);
