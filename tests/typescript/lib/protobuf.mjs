// Just enough of the protobuf wire format to write requests and read answers by hand.

function varint(number) {
  const bytes = [];
  let rest = BigInt(number);
  do {
    bytes.push(Number(rest & 0x7fn) | (rest > 0x7fn ? 0x80 : 0));
    rest >>= 7n;
  } while (rest > 0n);
  return Buffer.from(bytes);
}

/** A message from pairs of field number and value; text, bytes, numbers and booleans. */
export function message(...fields) {
  return Buffer.concat(
    fields.flatMap(([number, value]) => {
      if (typeof value === "number" || typeof value === "boolean") {
        return [varint(number << 3), varint(Number(value))];
      }
      const bytes = Buffer.from(value);
      return [varint((number << 3) | 2), varint(bytes.length), bytes];
    }),
  );
}

/** The fields of a message: number to the last value, a number or bytes. */
export function parse(bytes) {
  const fields = {};
  let offset = 0;
  const next = () => {
    let value = 0n;
    for (let shift = 0n; ; shift += 7n) {
      const byte = bytes[offset++];
      value |= BigInt(byte & 0x7f) << shift;
      if (byte < 0x80) return Number(BigInt.asIntN(64, value));
    }
  };
  while (offset < bytes.length) {
    const key = next();
    if ((key & 7) === 0) {
      fields[key >> 3] = next();
    } else {
      const length = next();
      fields[key >> 3] = bytes.subarray(offset, offset + length);
      offset += length;
    }
  }
  return fields;
}
