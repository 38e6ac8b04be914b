using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;
using System.Runtime.Intrinsics.X86;

namespace Rollout.Kernels;

/// <summary>The int8 tile in C#, for machines without <see cref="VnniTile"/>. Integer sums are exact, so both give the same bits.</summary>
internal abstract unsafe class Int8Tile
{
    public static Int8Tile Of(int vectorBits) => vectorBits switch
    {
        512 => new Int8Tile<Dot512>(),
        256 => new Int8Tile<Dot256>(),
        _ => new Int8Tile<Dot128>(),
    };

    public abstract void Run(int height, ref Int8TileArguments arguments);
}

/// <summary>32-bit lanes of four bytes each.</summary>
internal unsafe interface IDot<TSelf>
    where TSelf : unmanaged, IDot<TSelf>
{
    static abstract int Lanes { get; }

    static abstract TSelf Create(int value);

    static abstract TSelf Load(byte* source);

    /// <summary>sum + the dot product of each lane's four unsigned bytes with four signed ones.</summary>
    static abstract TSelf Dot(TSelf sum, TSelf unsigned, TSelf signed);

    /// <summary>sums[lane] = fma(value[lane], scale, sums[lane]).</summary>
    static abstract void AddTo(float* sums, TSelf value, float scale);
}

internal sealed unsafe class Int8Tile<TDot> : Int8Tile
    where TDot : unmanaged, IDot<TDot>
{
    private const int LineBytes = PanelLayout.Width * Int8Layout.Group;

    public override void Run(int height, ref Int8TileArguments a)
    {
        long blockBytes = a.GroupsPerBlock * LineBytes;
        for (long block = 0; block < a.Blocks; block++)
        {
            sbyte* activations = a.Activations + (block * a.GroupsPerBlock * Int8Layout.Group * height);
            byte* panel = a.Panel + (block * blockBytes);
            int* corrections = a.Corrections + (block * height);
            float* scales = a.Scales + (block * height);
            for (int lane = 0; lane < PanelLayout.Width; lane += TDot.Lanes)
            {
                byte* lanes = panel + (lane * Int8Layout.Group);
                float* sums = a.Sums + lane;
                int row = 0;
                for (; row + 4 <= height; row += 4)
                    Four(row, height, (int)a.GroupsPerBlock, activations, lanes, corrections, scales, sums);
                for (; row < height; row++)
                    One(row, height, (int)a.GroupsPerBlock, activations, lanes, corrections, scales, sums);
            }
        }
    }

    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static void Four(
        int row, int height, int groups, sbyte* activations, byte* lanes, int* corrections, float* scales, float* sums)
    {
        TDot a0 = TDot.Create(corrections[row]), a1 = TDot.Create(corrections[row + 1]);
        TDot a2 = TDot.Create(corrections[row + 2]), a3 = TDot.Create(corrections[row + 3]);
        int* x = (int*)activations + row;
        for (int g = 0; g < groups; g++, x += height, lanes += LineBytes)
        {
            TDot weights = TDot.Load(lanes);
            a0 = TDot.Dot(a0, weights, TDot.Create(x[0]));
            a1 = TDot.Dot(a1, weights, TDot.Create(x[1]));
            a2 = TDot.Dot(a2, weights, TDot.Create(x[2]));
            a3 = TDot.Dot(a3, weights, TDot.Create(x[3]));
        }

        TDot.AddTo(sums + (row * PanelLayout.Width), a0, scales[row]);
        TDot.AddTo(sums + ((row + 1) * PanelLayout.Width), a1, scales[row + 1]);
        TDot.AddTo(sums + ((row + 2) * PanelLayout.Width), a2, scales[row + 2]);
        TDot.AddTo(sums + ((row + 3) * PanelLayout.Width), a3, scales[row + 3]);
    }

    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static void One(
        int row, int height, int groups, sbyte* activations, byte* lanes, int* corrections, float* scales, float* sums)
    {
        TDot sum = TDot.Create(corrections[row]);
        int* x = (int*)activations + row;
        for (int g = 0; g < groups; g++, x += height, lanes += LineBytes)
            sum = TDot.Dot(sum, TDot.Load(lanes), TDot.Create(*x));
        TDot.AddTo(sums + (row * PanelLayout.Width), sum, scales[row]);
    }
}

// Bytes 0 and 2 of a lane, then 1 and 3, as 16-bit numbers: products of unsigned and signed bytes fit 16 bits, but the sum of two does not,
// so the instruction that multiplies bytes and saturates is of no use.

internal readonly unsafe struct Dot512(Vector512<int> value) : IDot<Dot512>
{
    public readonly Vector512<int> V = value;

    public static int Lanes => 16;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Dot512 Create(int value) => new(Vector512.Create(value));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Dot512 Load(byte* source) => new(Vector512.Load((int*)source));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Dot512 Dot(Dot512 sum, Dot512 unsigned, Dot512 signed)
    {
        Vector512<short> even = unsigned.V.AsInt16() & Vector512.Create((short)0xFF), odd = unsigned.V.AsInt16() >>> 8;
        Vector512<short> signedEven = signed.V.AsInt16() << 8 >> 8, signedOdd = signed.V.AsInt16() >> 8;
        return new(sum.V + Avx512BW.MultiplyAddAdjacent(even, signedEven) + Avx512BW.MultiplyAddAdjacent(odd, signedOdd));
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void AddTo(float* sums, Dot512 value, float scale) =>
        Vector512.FusedMultiplyAdd(Vector512.ConvertToSingle(value.V), Vector512.Create(scale), Vector512.Load(sums)).Store(sums);
}

internal readonly unsafe struct Dot256(Vector256<int> value) : IDot<Dot256>
{
    public readonly Vector256<int> V = value;

    public static int Lanes => 8;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Dot256 Create(int value) => new(Vector256.Create(value));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Dot256 Load(byte* source) => new(Vector256.Load((int*)source));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Dot256 Dot(Dot256 sum, Dot256 unsigned, Dot256 signed)
    {
        if (AvxVnni.IsSupported)
            return new(AvxVnni.MultiplyWideningAndAdd(sum.V, unsigned.V.AsByte(), signed.V.AsSByte()));
        Vector256<short> even = unsigned.V.AsInt16() & Vector256.Create((short)0xFF), odd = unsigned.V.AsInt16() >>> 8;
        Vector256<short> signedEven = signed.V.AsInt16() << 8 >> 8, signedOdd = signed.V.AsInt16() >> 8;
        return new(sum.V + Avx2.MultiplyAddAdjacent(even, signedEven) + Avx2.MultiplyAddAdjacent(odd, signedOdd));
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void AddTo(float* sums, Dot256 value, float scale) =>
        Vector256.FusedMultiplyAdd(Vector256.ConvertToSingle(value.V), Vector256.Create(scale), Vector256.Load(sums)).Store(sums);
}

internal readonly unsafe struct Dot128(Vector128<int> value) : IDot<Dot128>
{
    public readonly Vector128<int> V = value;

    public static int Lanes => 4;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Dot128 Create(int value) => new(Vector128.Create(value));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Dot128 Load(byte* source) => new(Vector128.Load((int*)source));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Dot128 Dot(Dot128 sum, Dot128 unsigned, Dot128 signed)
    {
        // Portable: one byte of every lane at a time.
        Vector128<int> u = unsigned.V, s = signed.V, low = Vector128.Create(0xFF);
        return new(sum.V
            + ((u & low) * (s << 24 >> 24))
            + ((u >>> 8 & low) * (s << 16 >> 24))
            + ((u >>> 16 & low) * (s << 8 >> 24))
            + ((u >>> 24) * (s >> 24)));
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void AddTo(float* sums, Dot128 value, float scale) =>
        Vector128.FusedMultiplyAdd(Vector128.ConvertToSingle(value.V), Vector128.Create(scale), Vector128.Load(sums)).Store(sums);
}
