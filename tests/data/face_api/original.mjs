// What face-api itself answers to the test pictures: node original.mjs <package folder> <weights folder> <pictures folder>
import fs from 'fs';
import { pathToFileURL } from 'url';

const [packageFolder, weightsFolder, pictures] = process.argv.slice(2);
globalThis.window = globalThis;
globalThis.document = { createElement: () => ({ getContext: () => null }) };
const domClasses = ['HTMLImageElement', 'HTMLCanvasElement', 'HTMLVideoElement', 'ImageData', 'Image', 'CanvasRenderingContext2D'];
for (const name of domClasses) globalThis[name] ??= class {};
globalThis.addEventListener ??= () => {};

const faceapi = await import(pathToFileURL(`${packageFolder}/dist/face-api.esm.js`));
const { tf, nets } = faceapi;
await tf.setBackend('cpu');
await tf.ready();

for (const [net, name] of [[nets.tinyFaceDetector, 'tiny_face_detector_model'], [nets.faceExpressionNet, 'face_expression_model']]) {
  const [group] = JSON.parse(fs.readFileSync(`${weightsFolder}/${name}-weights_manifest.json`));
  const bytes = new Uint8Array(fs.readFileSync(`${weightsFolder}/${group.paths[0]}`));
  net.loadFromWeightMap(tf.io.decodeWeights(bytes.buffer, group.weights));
}

const picture = (name, size) =>
  tf.tensor3d(new Uint8Array(fs.readFileSync(`${pictures}/${name}.rgb`)), [size, size, 3], 'int32').expandDims(0);
const short = (values) => Array.from(values, (value) => Number(value.toPrecision(7)));

const detector = nets.tinyFaceDetector;
const raw = await detector.forward(picture('square', 416), 416);
const found = await detector.extractBoxes(raw, { width: 416, height: 416 }, 0);
const ranked = found.map((box, index) => ({ ...box, index })).sort((a, b) => b.score - a.score);
const detections = ranked.slice(0, 24).map(({ index, score, box }) =>
  ({ index, score: short([score])[0], box: short([box.left, box.top, box.right, box.bottom]) }));
const scoreSum = short([found.reduce((sum, { score }) => sum + score, 0)])[0];

const expressions = {};
for (const name of ['face', 'hand']) {
  const input = await faceapi.toNetInput(picture(name, 112));
  const features = nets.faceExpressionNet.faceFeatureExtractor.forwardInput(input).flatten();
  const logits = nets.faceExpressionNet.runNet(input).flatten();
  expressions[name] = { features: short(features.dataSync()), logits: short(logits.dataSync()) };
}
const line = (value) => JSON.stringify(value);
console.log(`{"anchors": ${found.length}, "score_sum": ${scoreSum},\n"detections": [\n${detections.map(line).join(',\n')}],`);
console.log(`"expressions": {\n${Object.entries(expressions).map(([name, value]) => `${line(name)}: ${line(value)}`).join(',\n')}}}`);
