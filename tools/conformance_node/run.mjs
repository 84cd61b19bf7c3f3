// Runs calls of a streaming model in onnxruntime-web or onnxruntime-node, carrying the state from
// call to call; tools/conformance.py writes the calls and compares what comes out.
//
//   node run.mjs onnxruntime-web FOLDER
//
// FOLDER/calls.json: {model, data, outputs, state: [{name, type, dims}], calls: [{name: {type, dims,
// values}}]}. The outputs of call N are written to FOLDER/N/NAME.bin, as their bytes.
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { basename, join } from "node:path";

const ARRAYS = { float32: Float32Array, int64: BigInt64Array };

// Half-precision numbers: old versions of Node have no array of them, and the packages take bits.
const arrayOf = (type) => ARRAYS[type] ?? globalThis.Float16Array ?? Uint16Array;

const [library, folder] = process.argv.slice(2);
const imported = await import(library);
const ort = imported.InferenceSession ? imported : imported.default;
const plan = JSON.parse(readFileSync(join(folder, "calls.json"), "utf8"));

const tensor = ({ type, dims, values }) => {
  const count = dims.reduce((product, size) => product * size, 1);
  const numbers = values && (type === "int64" ? values.map(BigInt) : values);
  const array = arrayOf(type);
  return new ort.Tensor(type, numbers ? array.from(numbers) : new array(count), dims);
};

const session =
  library === "onnxruntime-web"
    ? await ort.InferenceSession.create(readFileSync(plan.model), {
        executionProviders: ["wasm"],
        externalData: [{ path: basename(plan.data), data: readFileSync(plan.data) }],
      })
    : await ort.InferenceSession.create(plan.model);

const state = Object.fromEntries(plan.state.map((entry) => [`past.${entry.name}`, tensor(entry)]));
for (const [number, call] of plan.calls.entries()) {
  const inputs = Object.fromEntries(Object.entries(call).map(([name, given]) => [name, tensor(given)]));
  const found = await session.run({ ...inputs, ...state });
  mkdirSync(join(folder, String(number)));
  for (const name of plan.outputs) {
    const { data } = found[name];
    writeFileSync(
      join(folder, String(number), `${name}.bin`),
      new Uint8Array(data.buffer, data.byteOffset, data.byteLength),
    );
  }
  for (const { name } of plan.state) {
    state[`past.${name}`] = found[`present.${name}`];
  }
}
