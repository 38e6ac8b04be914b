using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;
using System.Runtime.Intrinsics.X86;

namespace Rollout.Kernels;

/// <summary>
/// int8 matrices [outputs, inputs] in <see cref="LanePanels"/>, four inputs a lane. Lanes are the operand of the instruction which
/// multiplies four unsigned bytes with four signed ones and adds the products to a 32-bit sum, so weights are stored as q + 128, q in -127
/// .. 127, and the kernel subtracts 128 times the sum of the activations. One fp32 scale per output: weight = q * scale, scale = largest
/// magnitude of the row / 127.
/// </summary>
internal static unsafe class Int8Layout
{
    /// <summary>Inputs that one 32-bit lane holds.</summary>
    public const int Group = 4;

    /// <summary>Inputs whose activations share a scale.</summary>
    public const int Block = 128;

    private const int Width = PanelLayout.Width;

    /// <summary>1.5 * 2^23: adding it to |x| under 2^22 rounds x to the nearest integer, ties to even, into the low bits.</summary>
    private const float Rounder = 12582912f;

    public static int Groups(int inputs) => (inputs + Group - 1) / Group;

    public static int Blocks(int inputs) => (inputs + Block - 1) / Block;

    public static long PanelBytes(int inputs) => LanePanels.PanelBytes(Groups(inputs));

    public static long Bytes(int outputs, int inputs) =>
        PanelLayout.Count(outputs) * (PanelBytes(inputs) + (Width * sizeof(float)));

    /// <summary>Scales are stored after the panels, [outputs padded to 32].</summary>
    public static float* Scales(byte* panels, int outputs, int inputs) =>
        (float*)(panels + (PanelLayout.Count(outputs) * PanelBytes(inputs)));

    /// <summary>Packs whole rows. Writers of different rows never touch each other's bytes.</summary>
    public static void Write(byte* panels, int outputs, int inputs, int output, byte* source, long rows, DType type)
    {
        int groups = Groups(inputs);
        float* scales = Scales(panels, outputs, inputs);
        LanePanels.Scratch scratch = new(inputs, groups);
        while (rows > 0)
        {
            int first = output % Width;
            int count = (int)Math.Min(Width - first, rows);
            for (int r = 0; r < count; r++, source += (long)inputs * type.Size())
                scales[output + r] = QuantiseRow(source, inputs, type, scratch.Values, scratch.Row(first + r));
            LanePanels.Store(scratch, groups, first, first + count, panels + (output / Width * PanelBytes(inputs)));
            output += count;
            rows -= count;
        }

        LanePanels.Fence();
    }

    /// <summary>One output's weights as fp32, <paramref name="count"/> of them from input <paramref name="first"/> on.</summary>
    public static void ReadRow(byte* panels, int outputs, int inputs, int output, int first, int count, float* destination)
    {
        byte* lane = panels + (output / Width * PanelBytes(inputs)) + (output % Width * Group);
        float scale = Scales(panels, outputs, inputs)[output];
        for (int k = first; k < first + count; k++)
            destination[k - first] = (lane[(k / Group * Width * Group) + (k % Group)] - 128) * scale;
    }

    /// <summary>
    /// Activations of one row and block: <paramref name="count"/> values become bytes q, four to a group, <paramref name="stride"/> bytes
    /// from group to group, with x = q * scale, scale = largest magnitude / 127. Returns the scale, not a number where x holds one, and the
    /// sum of q. Inputs past the end are zero.
    /// </summary>
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    public static float QuantiseBlock(float* x, int count, sbyte* q, int stride, out int sum)
    {
        // Magnitudes order as their bits do; not-a-numbers order last and make the scale one of them.
        uint* bits = (uint*)x;
        Vector512<uint> largest = Vector512<uint>.Zero;
        int k = 0;
        for (; k + 16 <= count; k += 16)
            largest = Vector512.Max(largest, Vector512.Load(bits + k) & Vector512.Create(0x7FFFFFFFu));
        Vector256<uint> eight = Vector256.Max(largest.GetLower(), largest.GetUpper());
        Vector128<uint> four = Vector128.Max(eight.GetLower(), eight.GetUpper());
        uint most = Math.Max(Math.Max(four[0], four[1]), Math.Max(four[2], four[3]));
        for (; k < count; k++)
            most = Math.Max(most, bits[k] & 0x7FFFFFFF);
        float magnitude = BitConverter.UInt32BitsToSingle(most);

        Vector512<float> inverse16 = Vector512.Create(Inverse(magnitude));
        Vector512<int> total16 = Vector512<int>.Zero;
        for (k = 0; k + 16 <= count; k += 16)
        {
            Vector512<int> rounded = Round(Vector512.Load(x + k) * inverse16);
            total16 += rounded;
            Vector128<uint> groups = Bytes(rounded);
            *(uint*)q = groups[0];
            *(uint*)(q + stride) = groups[1];
            *(uint*)(q + (2 * stride)) = groups[2];
            *(uint*)(q + (3 * stride)) = groups[3];
            q += 4 * stride;
        }

        Vector256<int> total8 = total16.GetLower() + total16.GetUpper();
        Vector128<int> total = total8.GetLower() + total8.GetUpper();
        Vector128<float> inverse = Vector128.Create(Inverse(magnitude));
        for (; k + 4 <= count; k += 4, q += stride)
        {
            Vector128<int> rounded = Round(Vector128.Load(x + k) * inverse);
            total += rounded;
            *(uint*)q = Bytes(rounded);
        }

        if (k < count)
        {
            float* rest = stackalloc float[Group];
            for (int i = 0; k + i < count; i++)
                rest[i] = x[k + i];
            Vector128<int> rounded = Round(Vector128.Load(rest) * inverse);
            total += rounded;
            *(uint*)q = Bytes(rounded);
        }

        sum = Vector128.Sum(total);
        return magnitude / 127f;
    }

    /// <summary>
    /// Bytes q + 128 of one row, four to a group; returns the row's scale. <paramref name="values"/> is scratch, [inputs].
    /// </summary>
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static float QuantiseRow(byte* source, int inputs, DType type, ushort* values, uint* row)
    {
        // Rounded to bf16 first, whatever the type: a model in int8 then differs from the same model in bf16 by the quantisation alone.
        ushort* bf16 = values;
        PanelLayout.Convert(source, bf16, inputs, type);
        bf16[inputs] = bf16[inputs + 1] = bf16[inputs + 2] = 0;
        Vector256<ushort> largest = Vector256<ushort>.Zero, magnitude = Vector256.Create((ushort)0x7FFF);
        int k = 0;
        for (; k + 16 <= inputs; k += 16)
            largest = Vector256.Max(largest, Vector256.Load(bf16 + k) & magnitude);
        ushort most = 0;
        for (int i = 0; i < 16; i++)
            most = Math.Max(most, largest[i]);
        for (; k < inputs; k++)
            most = Math.Max(most, (ushort)(bf16[k] & 0x7FFF));

        // Magnitudes of bf16 order as their bits do; infinities and not-a-numbers order last and make the scale one of them.
        float top = PanelLayout.ToSingle(most);
        float inverse = Inverse(top);
        k = 0;
        for (; k + 16 <= inputs; k += 16)
        {
            (Vector256<uint> low, Vector256<uint> high) = Vector256.Widen(Vector256.Load(bf16 + k));
            Vector256<int> a = Round((low << 16).AsSingle() * Vector256.Create(inverse));
            Vector256<int> b = Round((high << 16).AsSingle() * Vector256.Create(inverse));
            Vector256<short> words = Vector256.Narrow(a, b) + Vector256.Create((short)128);
            Vector128.Narrow(words.GetLower().AsUInt16(), words.GetUpper().AsUInt16()).AsUInt32().Store(row + (k / Group));
        }

        for (; k < inputs; k += Group)
        {
            Vector128<uint> wide = Vector128.Create(bf16[k], bf16[k + 1], bf16[k + 2], (uint)bf16[k + 3]);
            row[k / Group] = Bytes(Round((wide << 16).AsSingle() * Vector128.Create(inverse))) ^ 0x80808080u;
        }

        return top / 127f;
    }

    /// <summary>0 for a row of zeros, and where the reciprocal would overflow: such values are negligible beside any other.</summary>
    private static float Inverse(float magnitude) => magnitude > 1e-36f ? 127f / magnitude : 0f;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Vector128<int> Round(Vector128<float> x) =>
        (x + Vector128.Create(Rounder)).AsInt32() - Vector128.Create(Rounder).AsInt32();

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Vector256<int> Round(Vector256<float> x) =>
        (x + Vector256.Create(Rounder)).AsInt32() - Vector256.Create(Rounder).AsInt32();

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Vector512<int> Round(Vector512<float> x) =>
        (x + Vector512.Create(Rounder)).AsInt32() - Vector512.Create(Rounder).AsInt32();

    /// <summary>Sixteen integers of a byte's range as bytes, four to a group.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Vector128<uint> Bytes(Vector512<int> q)
    {
        if (Avx512F.IsSupported)
            return Avx512F.ConvertToVector128SByte(q).AsUInt32();
        Vector256<short> words = Vector256.Narrow(q.GetLower(), q.GetUpper());
        return Vector128.Narrow(words.GetLower(), words.GetUpper()).AsUInt32();
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static uint Bytes(Vector128<int> q)
    {
        Vector128<short> words = Vector128.Narrow(q, q);
        return Vector128.Narrow(words, words).AsUInt32().ToScalar();
    }
}
