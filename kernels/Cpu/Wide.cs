using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;

namespace Rollout.Kernels;

/// <summary>One machine vector of fp32, as the matmul tile uses it.</summary>
internal unsafe interface IVector<TSelf>
    where TSelf : unmanaged, IVector<TSelf>
{
    /// <summary>Lanes.</summary>
    static abstract int Width { get; }

    /// <summary>Rows of the tallest tile: two accumulators a row, two weights and a broadcast have to fit the register file.</summary>
    static abstract int TileRows { get; }

    static abstract TSelf Create(float value);

    static abstract TSelf Load(float* source);

    static abstract void Store(float* destination, TSelf value);

    /// <summary>2 x Width bfloat16 in the order of a panel's line: even elements, then odd ones.</summary>
    static abstract void LoadPair(ushort* source, out TSelf even, out TSelf odd);

    static abstract TSelf Fma(TSelf a, TSelf b, TSelf c);

    static abstract TSelf operator +(TSelf a, TSelf b);
}

internal readonly unsafe struct Wide512(Vector512<float> value) : IVector<Wide512>
{
    public readonly Vector512<float> V = value;

    public static int Width => 16;

    public static int TileRows => 12;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Wide512 Create(float value) => new(Vector512.Create(value));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Wide512 Load(float* source) => new(Vector512.Load(source));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Store(float* destination, Wide512 value) => value.V.Store(destination);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void LoadPair(ushort* source, out Wide512 even, out Wide512 odd)
    {
        Vector512<uint> pair = Vector512.Load((uint*)source);
        even = new((pair << 16).AsSingle());
        odd = new((pair & Vector512.Create(0xFFFF0000u)).AsSingle());
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Wide512 Fma(Wide512 a, Wide512 b, Wide512 c) => new(Vector512.FusedMultiplyAdd(a.V, b.V, c.V));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Wide512 operator +(Wide512 a, Wide512 b) => new(a.V + b.V);
}

internal readonly unsafe struct Wide256(Vector256<float> value) : IVector<Wide256>
{
    public readonly Vector256<float> V = value;

    public static int Width => 8;

    public static int TileRows => 6;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Wide256 Create(float value) => new(Vector256.Create(value));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Wide256 Load(float* source) => new(Vector256.Load(source));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Store(float* destination, Wide256 value) => value.V.Store(destination);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void LoadPair(ushort* source, out Wide256 even, out Wide256 odd)
    {
        Vector256<uint> pair = Vector256.Load((uint*)source);
        even = new((pair << 16).AsSingle());
        odd = new((pair & Vector256.Create(0xFFFF0000u)).AsSingle());
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Wide256 Fma(Wide256 a, Wide256 b, Wide256 c) => new(Vector256.FusedMultiplyAdd(a.V, b.V, c.V));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Wide256 operator +(Wide256 a, Wide256 b) => new(a.V + b.V);
}

internal readonly unsafe struct Wide128(Vector128<float> value) : IVector<Wide128>
{
    public readonly Vector128<float> V = value;

    public static int Width => 4;

    public static int TileRows => 6;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Wide128 Create(float value) => new(Vector128.Create(value));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Wide128 Load(float* source) => new(Vector128.Load(source));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Store(float* destination, Wide128 value) => value.V.Store(destination);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void LoadPair(ushort* source, out Wide128 even, out Wide128 odd)
    {
        Vector128<uint> pair = Vector128.Load((uint*)source);
        even = new((pair << 16).AsSingle());
        odd = new((pair & Vector128.Create(0xFFFF0000u)).AsSingle());
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Wide128 Fma(Wide128 a, Wide128 b, Wide128 c) => new(Vector128.FusedMultiplyAdd(a.V, b.V, c.V));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Wide128 operator +(Wide128 a, Wide128 b) => new(a.V + b.V);
}
