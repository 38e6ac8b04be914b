using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;
using System.Runtime.Intrinsics.X86;

namespace Rollout.Kernels;

/// <summary>Transposes 16 x 16 lanes of 32 bits in registers, for packing. Needs AVX-512.</summary>
internal static unsafe class Transpose16
{
    /// <summary>
    /// lines [16][16], <paramref name="lineStride"/> apart and aligned to 64 bytes = rows [16][16], <paramref name="stride"/> apart,
    /// transposed.
    /// </summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Store(uint* rows, long stride, uint* lines, int lineStride)
    {
        Four(Row(rows, stride, 0), Row(rows, stride, 1), Row(rows, stride, 2), Row(rows, stride, 3),
            out Vector512<uint> a0, out Vector512<uint> a1, out Vector512<uint> a2, out Vector512<uint> a3);
        Four(Row(rows, stride, 4), Row(rows, stride, 5), Row(rows, stride, 6), Row(rows, stride, 7),
            out Vector512<uint> b0, out Vector512<uint> b1, out Vector512<uint> b2, out Vector512<uint> b3);
        Four(Row(rows, stride, 8), Row(rows, stride, 9), Row(rows, stride, 10), Row(rows, stride, 11),
            out Vector512<uint> c0, out Vector512<uint> c1, out Vector512<uint> c2, out Vector512<uint> c3);
        Four(Row(rows, stride, 12), Row(rows, stride, 13), Row(rows, stride, 14), Row(rows, stride, 15),
            out Vector512<uint> d0, out Vector512<uint> d1, out Vector512<uint> d2, out Vector512<uint> d3);
        Spread(a0, b0, c0, d0, lines, lineStride);
        Spread(a1, b1, c1, d1, lines + lineStride, lineStride);
        Spread(a2, b2, c2, d2, lines + (2 * lineStride), lineStride);
        Spread(a3, b3, c3, d3, lines + (3 * lineStride), lineStride);
    }

    /// <summary>Four rows: within 128-bit parts a 4 x 4 transpose, leaving in part q of column c the lanes 4q + c of the rows.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Four(
        Vector512<uint> r0,
        Vector512<uint> r1,
        Vector512<uint> r2,
        Vector512<uint> r3,
        out Vector512<uint> t0,
        out Vector512<uint> t1,
        out Vector512<uint> t2,
        out Vector512<uint> t3)
    {
        Vector512<ulong> x0 = Avx512F.UnpackLow(r0, r1).AsUInt64(), x1 = Avx512F.UnpackHigh(r0, r1).AsUInt64();
        Vector512<ulong> x2 = Avx512F.UnpackLow(r2, r3).AsUInt64(), x3 = Avx512F.UnpackHigh(r2, r3).AsUInt64();
        t0 = Avx512F.UnpackLow(x0, x2).AsUInt32();
        t1 = Avx512F.UnpackHigh(x0, x2).AsUInt32();
        t2 = Avx512F.UnpackLow(x1, x3).AsUInt32();
        t3 = Avx512F.UnpackHigh(x1, x3).AsUInt32();
    }

    /// <summary>Part q of a, b, c, d makes line 4q. Whole lines bypass the caches: they are not read again soon.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Spread(
        Vector512<uint> a, Vector512<uint> b, Vector512<uint> c, Vector512<uint> d, uint* lines, int lineStride)
    {
        Vector512<uint> ab02 = Avx512F.Shuffle4x128(a, b, 0b10_00_10_00), ab13 = Avx512F.Shuffle4x128(a, b, 0b11_01_11_01);
        Vector512<uint> cd02 = Avx512F.Shuffle4x128(c, d, 0b10_00_10_00), cd13 = Avx512F.Shuffle4x128(c, d, 0b11_01_11_01);
        Avx512F.Shuffle4x128(ab02, cd02, 0b10_00_10_00).StoreAlignedNonTemporal(lines);
        Avx512F.Shuffle4x128(ab13, cd13, 0b10_00_10_00).StoreAlignedNonTemporal(lines + (4 * lineStride));
        Avx512F.Shuffle4x128(ab02, cd02, 0b11_01_11_01).StoreAlignedNonTemporal(lines + (8 * lineStride));
        Avx512F.Shuffle4x128(ab13, cd13, 0b11_01_11_01).StoreAlignedNonTemporal(lines + (12 * lineStride));
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Vector512<uint> Row(uint* rows, long stride, int j) => Vector512.Load(rows + (j * stride));
}
