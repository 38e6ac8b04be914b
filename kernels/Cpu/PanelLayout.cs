using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;
using System.Runtime.Intrinsics.X86;

namespace Rollout.Kernels;

/// <summary>
/// bfloat16 matrices [outputs, inputs] in panels of 32 outputs. Panel p holds, for each input k, one cache line: the weights of outputs
/// 32p .. 32p + 31. Element 2j of the line is output j and element 2j + 1 output 16 + j, so that a 32-bit lane shifted left by 16 is the
/// fp32 value of output j, and the same lane with its low half cleared that of output 16 + j: two operations, no shuffle, and 16
/// consecutive outputs in each vector. The last panel is padded with zero outputs.
/// </summary>
internal static unsafe class PanelLayout
{
    public const int Width = 32;

    /// <summary>Inputs per pass when packing: 32 rows of one cache line each.</summary>
    private const int Block = 32;

    /// <summary>Inputs by which packing prefetches.</summary>
    private const int Ahead = 128;

    public static int RoundUp(int columns) => (columns + Width - 1) / Width * Width;

    public static int Count(int outputs) => (outputs + Width - 1) / Width;

    public static long Bytes(int outputs, int inputs) => (long)Count(outputs) * inputs * Width * sizeof(ushort);

    /// <summary>Where output <paramref name="o"/> of 32 is in its line.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static int Slot(int o) => ((o & 15) << 1) | ((o >> 4) & 1);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ushort* Line(ushort* panels, int inputs, int output, int input) =>
        panels + ((((long)(output / Width) * inputs) + input) * Width);

    /// <summary>Where an element of the row-major matrix is stored.</summary>
    public static ushort* Element(ushort* panels, int inputs, long element) =>
        Line(panels, inputs, (int)(element / inputs), (int)(element % inputs)) + Slot((int)(element / inputs % Width));

    /// <summary>
    /// Packs whole rows. Elements are written 16 bits at a time, or 32 rows at a time, so writers of different rows never touch each
    /// other's.
    /// </summary>
    public static void Write(ushort* panels, int inputs, int output, byte* source, long rows, DType type)
    {
        while (rows > 0)
        {
            int count = (int)Math.Min(Width - (output % Width), rows);
            if (count == Width)
                WritePanel(Line(panels, inputs, output, 0), inputs, source, type);
            else
                WriteRows(panels, inputs, output, count, source, type);
            output += count;
            rows -= count;
            source += (long)count * inputs * type.Size();
        }

        // Non-temporal stores are not ordered with the later stores by which the caller signals that it is done.
        if (Sse.IsSupported)
            Sse.StoreFence();
    }

    /// <summary>Part of one output's weights as fp32.</summary>
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    public static void ReadRow(ushort* panels, int inputs, int output, int first, int count, float* destination)
    {
        ushort* p = Line(panels, inputs, output, first) + Slot(output % Width);
        for (int k = 0; k < count; k++)
            destination[k] = ToSingle(p[(long)k * Width]);
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static float ToSingle(ushort bits) => BitConverter.UInt32BitsToSingle((uint)bits << 16);

    /// <summary>Element <paramref name="i"/> of little-endian values of a type, which need not be aligned.</summary>
    public static float ToSingle(byte* source, long i, DType type) => type switch
    {
        DType.BFloat16 => ToSingle(Unsafe.ReadUnaligned<ushort>(source + (2 * i))),
        DType.Float16 => (float)Unsafe.ReadUnaligned<Half>(source + (2 * i)),
        _ => Unsafe.ReadUnaligned<float>(source + (4 * i)),
    };

    /// <summary>Rounds to nearest, ties to even; not-a-number stays one.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ushort ToBFloat16(float value)
    {
        uint bits = BitConverter.SingleToUInt32Bits(value);
        uint rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
        return (ushort)((bits & 0x7FFFFFFF) > 0x7F800000 ? (bits >> 16) | 0x40 : rounded);
    }

    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    public static void Convert(byte* source, ushort* destination, int count, DType type)
    {
        switch (type)
        {
            case DType.BFloat16:
                Unsafe.CopyBlockUnaligned(destination, source, (uint)count * 2);
                break;
            case DType.Float16:
                for (int i = 0; i < count; i++)
                    destination[i] = ToBFloat16((float)Unsafe.ReadUnaligned<Half>(source + (2 * i)));
                break;
            default:
                int k = 0;
                if (Vector256.IsHardwareAccelerated)
                {
                    for (; k + 8 <= count; k += 8)
                    {
                        Vector256<uint> bits = Vector256.Load((uint*)(source + (4 * k)));
                        Vector256<uint> rounded = (bits + Vector256.Create(0x7FFFu) + ((bits >>> 16) & Vector256<uint>.One)) >>> 16;
                        Vector256<uint> nan = Vector256.GreaterThan(
                            (bits & Vector256.Create(0x7FFFFFFFu)).AsInt32(), Vector256.Create(0x7F800000)).AsUInt32();
                        Vector256<uint> quiet = (bits >>> 16) | Vector256.Create(0x40u);
                        rounded = Vector256.ConditionalSelect(nan, quiet, rounded);
                        Vector128.Narrow(rounded.GetLower(), rounded.GetUpper()).Store(destination + k);
                    }
                }

                for (; k < count; k++)
                    destination[k] = ToBFloat16(Unsafe.ReadUnaligned<float>(source + (4 * k)));
                break;
        }
    }

    /// <summary>Some rows of one panel: a few hundred inputs at a time, so that the panel's lines stay in the first-level cache.</summary>
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static void WriteRows(ushort* panels, int inputs, int output, int rows, byte* source, DType type)
    {
        const int Chunk = 256;
        int size = type.Size();
        ushort* converted = stackalloc ushort[Chunk];
        for (int start = 0; start < inputs; start += Chunk)
        {
            int count = Math.Min(Chunk, inputs - start);
            for (int r = 0; r < rows; r++)
            {
                Convert(source + ((((long)r * inputs) + start) * size), converted, count, type);
                ushort* line = Line(panels, inputs, output + r, start) + Slot((output + r) % Width);
                for (int k = 0; k < count; k++)
                    line[k * Width] = converted[k];
            }
        }
    }

    /// <summary>32 whole rows into one panel.</summary>
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static void WritePanel(ushort* panel, int inputs, byte* source, DType type)
    {
        int size = type.Size();
        ushort* staged = stackalloc ushort[Width * Block];
        for (int k = 0; k < inputs; k += Block)
        {
            int count = Math.Min(Block, inputs - k);
            ushort* rows;
            long stride;
            if (type == DType.BFloat16 && count == Block)
            {
                rows = (ushort*)source + k;
                stride = inputs;
            }
            else
            {
                for (int r = 0; r < Width; r++)
                    Convert(source + ((((long)r * inputs) + k) * size), staged + (r * Block), count, type);
                rows = staged;
                stride = Block;
            }

            // 32 rows are more streams than the hardware prefetches.
            if (Sse.IsSupported && type == DType.BFloat16)
            {
                for (int r = 0; r < Width; r++)
                    Sse.Prefetch0(source + ((((long)r * inputs) + k + Ahead) * size));
            }

            uint* lines = (uint*)(panel + ((long)k * Width));
            if (Avx512F.IsSupported && count == Block)
            {
                ZipTransposed(rows, stride, lines);
                ZipTransposed(rows + 16, stride, lines + (16 * 16));
            }
            else
            {
                for (int j = 0; j < 16; j++)
                {
                    ushort* low = rows + (j * stride);
                    ushort* high = rows + ((j + 16) * stride);
                    for (int i = 0; i < count; i++)
                        lines[(i * 16) + j] = low[i] | ((uint)high[i] << 16);
                }
            }
        }
    }

    /// <summary>
    /// 32 rows of 16 inputs to 16 lines: rows j and 16 + j are zipped into 32-bit lanes, then a 16 x 16 transpose of those lanes.
    /// </summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static void ZipTransposed(ushort* rows, long stride, uint* lines)
    {
        Transpose16.Four(Zip(rows, stride, 0), Zip(rows, stride, 1), Zip(rows, stride, 2), Zip(rows, stride, 3),
            out Vector512<uint> a0, out Vector512<uint> a1, out Vector512<uint> a2, out Vector512<uint> a3);
        Transpose16.Four(Zip(rows, stride, 4), Zip(rows, stride, 5), Zip(rows, stride, 6), Zip(rows, stride, 7),
            out Vector512<uint> b0, out Vector512<uint> b1, out Vector512<uint> b2, out Vector512<uint> b3);
        Transpose16.Four(Zip(rows, stride, 8), Zip(rows, stride, 9), Zip(rows, stride, 10), Zip(rows, stride, 11),
            out Vector512<uint> c0, out Vector512<uint> c1, out Vector512<uint> c2, out Vector512<uint> c3);
        Transpose16.Four(Zip(rows, stride, 12), Zip(rows, stride, 13), Zip(rows, stride, 14), Zip(rows, stride, 15),
            out Vector512<uint> d0, out Vector512<uint> d1, out Vector512<uint> d2, out Vector512<uint> d3);
        Transpose16.Spread(a0, b0, c0, d0, lines, 16);
        Transpose16.Spread(a1, b1, c1, d1, lines + 16, 16);
        Transpose16.Spread(a2, b2, c2, d2, lines + 32, 16);
        Transpose16.Spread(a3, b3, c3, d3, lines + 48, 16);
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Vector512<uint> Zip(ushort* rows, long stride, int j)
    {
        Vector512<uint> low = Avx512F.ConvertToVector512UInt32(Vector256.Load(rows + (j * stride)));
        Vector512<uint> high = Avx512F.ConvertToVector512UInt32(Vector256.Load(rows + ((j + 16) * stride)));
        return low | (high << 16);
    }
}
