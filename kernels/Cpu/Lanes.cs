using System.Numerics;
using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;
using System.Runtime.Intrinsics.X86;

namespace Rollout.Kernels;

/// <summary>
/// Sixteen fp32 lanes, whatever the machine's vectors are: one 512-bit, two 256-bit or four 128-bit registers. A kernel written once over
/// this interface gives the same bits at every width, because lane i always sees the same operations in the same order, and the only
/// operation across lanes is one fixed tree. Masks are lanes of all ones or all zeros; "bits" are the same lanes read as 32-bit integers.
/// </summary>
internal unsafe interface ILanes<TSelf>
    where TSelf : unmanaged, ILanes<TSelf>
{
    /// <summary>Queries of attention that fit the register file at once.</summary>
    static abstract int Queries { get; }

    /// <summary>Sixteen-lane columns that each of these queries multiplies at once.</summary>
    static abstract int Columns { get; }

    static abstract TSelf Create(float value);

    static abstract TSelf CreateBits(uint value);

    static abstract TSelf Load(float* source);

    static abstract void Store(float* destination, TSelf value);

    static abstract TSelf operator +(TSelf a, TSelf b);

    static abstract TSelf operator -(TSelf a, TSelf b);

    static abstract TSelf operator *(TSelf a, TSelf b);

    static abstract TSelf operator /(TSelf a, TSelf b);

    /// <summary>a * b + c, rounded once.</summary>
    static abstract TSelf Fma(TSelf a, TSelf b, TSelf c);

    /// <summary>The larger lane; where one is not a number, either.</summary>
    static abstract TSelf Max(TSelf a, TSelf b);

    static abstract TSelf Less(TSelf a, TSelf b);

    static abstract TSelf GreaterOrEqual(TSelf a, TSelf b);

    /// <summary>Lanes of a where the mask is set, of b elsewhere.</summary>
    static abstract TSelf Select(TSelf mask, TSelf a, TSelf b);

    static abstract TSelf And(TSelf a, TSelf b);

    static abstract TSelf Or(TSelf a, TSelf b);

    static abstract TSelf Xor(TSelf a, TSelf b);

    static abstract TSelf Not(TSelf a);

    static abstract TSelf AddBits(TSelf a, TSelf b);

    static abstract TSelf SubtractBits(TSelf a, TSelf b);

    static abstract TSelf ShiftLeft(TSelf a, int count);

    static abstract TSelf ShiftRight(TSelf a, int count);

    /// <summary>The 32-bit signed integers of a, as numbers.</summary>
    static abstract TSelf ToSingle(TSelf a);

    /// <summary>a * 2^n, rounded once also below the normal range; n whole numbers in [-150, 129].</summary>
    static abstract TSelf Scale(TSelf a, TSelf n);

    /// <summary>Upper halves of the unsigned 64-bit products of the bits.</summary>
    static abstract TSelf MultiplyHigh(TSelf a, TSelf b);

    /// <summary>Lower halves of the same products.</summary>
    static abstract TSelf MultiplyLow(TSelf a, TSelf b);

    static abstract bool Any(TSelf mask);

    /// <summary>Sum of the lanes: halves folded onto each other, 16, 8, 4, 2, 1.</summary>
    static abstract float Sum(TSelf a);

    static abstract float Largest(TSelf a);
}

/// <summary>Sixteen lanes in one AVX-512 register.</summary>
internal readonly unsafe struct Lanes512(Vector512<float> value) : ILanes<Lanes512>
{
    public readonly Vector512<float> V = value;

    public static int Queries => 8;

    public static int Columns => 2;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 Create(float value) => new(Vector512.Create(value));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 CreateBits(uint value) => new(Vector512.Create(value).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 Load(float* source) => new(Vector512.Load(source));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Store(float* destination, Lanes512 value) => value.V.Store(destination);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 operator +(Lanes512 a, Lanes512 b) => new(a.V + b.V);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 operator -(Lanes512 a, Lanes512 b) => new(a.V - b.V);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 operator *(Lanes512 a, Lanes512 b) => new(a.V * b.V);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 operator /(Lanes512 a, Lanes512 b) => new(a.V / b.V);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 Fma(Lanes512 a, Lanes512 b, Lanes512 c) => new(Vector512.FusedMultiplyAdd(a.V, b.V, c.V));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 Max(Lanes512 a, Lanes512 b) => new(Vector512.MaxNative(a.V, b.V));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 Less(Lanes512 a, Lanes512 b) => new(Vector512.LessThan(a.V, b.V));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 GreaterOrEqual(Lanes512 a, Lanes512 b) => new(Vector512.GreaterThanOrEqual(a.V, b.V));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 Select(Lanes512 mask, Lanes512 a, Lanes512 b) => new(Vector512.ConditionalSelect(mask.V, a.V, b.V));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 And(Lanes512 a, Lanes512 b) => new(a.V & b.V);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 Or(Lanes512 a, Lanes512 b) => new(a.V | b.V);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 Xor(Lanes512 a, Lanes512 b) => new(a.V ^ b.V);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 Not(Lanes512 a) => new(~a.V);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 AddBits(Lanes512 a, Lanes512 b) => new((a.V.AsUInt32() + b.V.AsUInt32()).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 SubtractBits(Lanes512 a, Lanes512 b) => new((a.V.AsUInt32() - b.V.AsUInt32()).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 ShiftLeft(Lanes512 a, int count) => new((a.V.AsUInt32() << count).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 ShiftRight(Lanes512 a, int count) => new((a.V.AsUInt32() >>> count).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 ToSingle(Lanes512 a) => new(Vector512.ConvertToSingle(a.V.AsInt32()));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 Scale(Lanes512 a, Lanes512 n) =>
        Avx512F.IsSupported ? new(Avx512F.Scale(a.V, n.V)) : VectorMath.ScaleInTwo(a, n);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 MultiplyHigh(Lanes512 a, Lanes512 b)
    {
        Vector512<uint> x = a.V.AsUInt32(), y = b.V.AsUInt32();
        if (!Avx512F.IsSupported)
        {
            return new(Vector512.Create(
                Lanes256.UpperHalves(x.GetLower(), y.GetLower()), Lanes256.UpperHalves(x.GetUpper(), y.GetUpper())).AsSingle());
        }

        Vector512<ulong> even = Avx512F.Multiply(x, y);
        Vector512<ulong> odd = Avx512F.Multiply((x.AsUInt64() >>> 32).AsUInt32(), (y.AsUInt64() >>> 32).AsUInt32());
        return new(Vector512.ConditionalSelect(Vector512.Create(0xFFFFFFFFul), even >>> 32, odd).AsSingle());
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 MultiplyLow(Lanes512 a, Lanes512 b) => new((a.V.AsUInt32() * b.V.AsUInt32()).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool Any(Lanes512 mask) => mask.V.AsUInt32().ExtractMostSignificantBits() != 0;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static float Sum(Lanes512 a) => Lanes128.Fold(a.V.GetLower() + a.V.GetUpper());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static float Largest(Lanes512 a) => Lanes128.FoldLargest(Vector256.MaxNative(a.V.GetLower(), a.V.GetUpper()));
}

/// <summary>Sixteen lanes in two 256-bit registers.</summary>
internal readonly unsafe struct Lanes256(Vector256<float> a, Vector256<float> b) : ILanes<Lanes256>
{
    public readonly Vector256<float> A = a;
    public readonly Vector256<float> B = b;

    public static int Queries => 4;

    public static int Columns => 1;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 Create(float value) => new(Vector256.Create(value), Vector256.Create(value));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 CreateBits(uint value) => new(Vector256.Create(value).AsSingle(), Vector256.Create(value).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 Load(float* source) => new(Vector256.Load(source), Vector256.Load(source + 8));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Store(float* destination, Lanes256 value)
    {
        value.A.Store(destination);
        value.B.Store(destination + 8);
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 operator +(Lanes256 a, Lanes256 b) => new(a.A + b.A, a.B + b.B);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 operator -(Lanes256 a, Lanes256 b) => new(a.A - b.A, a.B - b.B);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 operator *(Lanes256 a, Lanes256 b) => new(a.A * b.A, a.B * b.B);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 operator /(Lanes256 a, Lanes256 b) => new(a.A / b.A, a.B / b.B);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 Fma(Lanes256 a, Lanes256 b, Lanes256 c) =>
        new(Vector256.FusedMultiplyAdd(a.A, b.A, c.A), Vector256.FusedMultiplyAdd(a.B, b.B, c.B));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 Max(Lanes256 a, Lanes256 b) => new(Vector256.MaxNative(a.A, b.A), Vector256.MaxNative(a.B, b.B));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 Less(Lanes256 a, Lanes256 b) => new(Vector256.LessThan(a.A, b.A), Vector256.LessThan(a.B, b.B));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 GreaterOrEqual(Lanes256 a, Lanes256 b) =>
        new(Vector256.GreaterThanOrEqual(a.A, b.A), Vector256.GreaterThanOrEqual(a.B, b.B));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 Select(Lanes256 mask, Lanes256 a, Lanes256 b) =>
        new(Vector256.ConditionalSelect(mask.A, a.A, b.A), Vector256.ConditionalSelect(mask.B, a.B, b.B));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 And(Lanes256 a, Lanes256 b) => new(a.A & b.A, a.B & b.B);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 Or(Lanes256 a, Lanes256 b) => new(a.A | b.A, a.B | b.B);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 Xor(Lanes256 a, Lanes256 b) => new(a.A ^ b.A, a.B ^ b.B);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 Not(Lanes256 a) => new(~a.A, ~a.B);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 AddBits(Lanes256 a, Lanes256 b) =>
        new((a.A.AsUInt32() + b.A.AsUInt32()).AsSingle(), (a.B.AsUInt32() + b.B.AsUInt32()).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 SubtractBits(Lanes256 a, Lanes256 b) =>
        new((a.A.AsUInt32() - b.A.AsUInt32()).AsSingle(), (a.B.AsUInt32() - b.B.AsUInt32()).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 ShiftLeft(Lanes256 a, int count) =>
        new((a.A.AsUInt32() << count).AsSingle(), (a.B.AsUInt32() << count).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 ShiftRight(Lanes256 a, int count) =>
        new((a.A.AsUInt32() >>> count).AsSingle(), (a.B.AsUInt32() >>> count).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 ToSingle(Lanes256 a) =>
        new(Vector256.ConvertToSingle(a.A.AsInt32()), Vector256.ConvertToSingle(a.B.AsInt32()));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 Scale(Lanes256 a, Lanes256 n) => VectorMath.ScaleInTwo(a, n);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 MultiplyHigh(Lanes256 a, Lanes256 b) =>
        new(
            UpperHalves(a.A.AsUInt32(), b.A.AsUInt32()).AsSingle(),
            UpperHalves(a.B.AsUInt32(), b.B.AsUInt32()).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 MultiplyLow(Lanes256 a, Lanes256 b) =>
        new((a.A.AsUInt32() * b.A.AsUInt32()).AsSingle(), (a.B.AsUInt32() * b.B.AsUInt32()).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Vector256<uint> UpperHalves(Vector256<uint> x, Vector256<uint> y)
    {
        if (!Avx2.IsSupported)
        {
            return Vector256.Create(
                Lanes128.UpperHalves(x.GetLower(), y.GetLower()), Lanes128.UpperHalves(x.GetUpper(), y.GetUpper()));
        }

        Vector256<ulong> even = Avx2.Multiply(x, y);
        Vector256<ulong> odd = Avx2.Multiply((x.AsUInt64() >>> 32).AsUInt32(), (y.AsUInt64() >>> 32).AsUInt32());
        return Vector256.ConditionalSelect(Vector256.Create(0xFFFFFFFFul), even >>> 32, odd).AsUInt32();
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool Any(Lanes256 mask) => (mask.A | mask.B).AsUInt32().ExtractMostSignificantBits() != 0;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static float Sum(Lanes256 a) => Lanes128.Fold(a.A + a.B);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static float Largest(Lanes256 a) => Lanes128.FoldLargest(Vector256.MaxNative(a.A, a.B));
}

/// <summary>Sixteen lanes in four 128-bit registers: the portable path, hardware or software vectors alike.</summary>
internal readonly unsafe struct Lanes128(Vector128<float> a, Vector128<float> b, Vector128<float> c, Vector128<float> d) : ILanes<Lanes128>
{
    public readonly Vector128<float> A = a;
    public readonly Vector128<float> B = b;
    public readonly Vector128<float> C = c;
    public readonly Vector128<float> D = d;

    public static int Queries => 2;

    public static int Columns => 1;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Lanes128 Same(Vector128<float> v) => new(v, v, v, v);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 Create(float value) => Same(Vector128.Create(value));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 CreateBits(uint value) => Same(Vector128.Create(value).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 Load(float* source) =>
        new(Vector128.Load(source), Vector128.Load(source + 4), Vector128.Load(source + 8), Vector128.Load(source + 12));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Store(float* destination, Lanes128 value)
    {
        value.A.Store(destination);
        value.B.Store(destination + 4);
        value.C.Store(destination + 8);
        value.D.Store(destination + 12);
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 operator +(Lanes128 a, Lanes128 b) => new(a.A + b.A, a.B + b.B, a.C + b.C, a.D + b.D);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 operator -(Lanes128 a, Lanes128 b) => new(a.A - b.A, a.B - b.B, a.C - b.C, a.D - b.D);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 operator *(Lanes128 a, Lanes128 b) => new(a.A * b.A, a.B * b.B, a.C * b.C, a.D * b.D);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 operator /(Lanes128 a, Lanes128 b) => new(a.A / b.A, a.B / b.B, a.C / b.C, a.D / b.D);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 Fma(Lanes128 a, Lanes128 b, Lanes128 c) =>
        new(
            Vector128.FusedMultiplyAdd(a.A, b.A, c.A),
            Vector128.FusedMultiplyAdd(a.B, b.B, c.B),
            Vector128.FusedMultiplyAdd(a.C, b.C, c.C),
            Vector128.FusedMultiplyAdd(a.D, b.D, c.D));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 Max(Lanes128 a, Lanes128 b) =>
        new(
            Vector128.MaxNative(a.A, b.A),
            Vector128.MaxNative(a.B, b.B),
            Vector128.MaxNative(a.C, b.C),
            Vector128.MaxNative(a.D, b.D));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 Less(Lanes128 a, Lanes128 b) =>
        new(
            Vector128.LessThan(a.A, b.A),
            Vector128.LessThan(a.B, b.B),
            Vector128.LessThan(a.C, b.C),
            Vector128.LessThan(a.D, b.D));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 GreaterOrEqual(Lanes128 a, Lanes128 b) =>
        new(
            Vector128.GreaterThanOrEqual(a.A, b.A),
            Vector128.GreaterThanOrEqual(a.B, b.B),
            Vector128.GreaterThanOrEqual(a.C, b.C),
            Vector128.GreaterThanOrEqual(a.D, b.D));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 Select(Lanes128 mask, Lanes128 a, Lanes128 b) =>
        new(
            Vector128.ConditionalSelect(mask.A, a.A, b.A),
            Vector128.ConditionalSelect(mask.B, a.B, b.B),
            Vector128.ConditionalSelect(mask.C, a.C, b.C),
            Vector128.ConditionalSelect(mask.D, a.D, b.D));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 And(Lanes128 a, Lanes128 b) => new(a.A & b.A, a.B & b.B, a.C & b.C, a.D & b.D);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 Or(Lanes128 a, Lanes128 b) => new(a.A | b.A, a.B | b.B, a.C | b.C, a.D | b.D);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 Xor(Lanes128 a, Lanes128 b) => new(a.A ^ b.A, a.B ^ b.B, a.C ^ b.C, a.D ^ b.D);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 Not(Lanes128 a) => new(~a.A, ~a.B, ~a.C, ~a.D);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 AddBits(Lanes128 a, Lanes128 b) =>
        new(
            (a.A.AsUInt32() + b.A.AsUInt32()).AsSingle(),
            (a.B.AsUInt32() + b.B.AsUInt32()).AsSingle(),
            (a.C.AsUInt32() + b.C.AsUInt32()).AsSingle(),
            (a.D.AsUInt32() + b.D.AsUInt32()).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 SubtractBits(Lanes128 a, Lanes128 b) =>
        new(
            (a.A.AsUInt32() - b.A.AsUInt32()).AsSingle(),
            (a.B.AsUInt32() - b.B.AsUInt32()).AsSingle(),
            (a.C.AsUInt32() - b.C.AsUInt32()).AsSingle(),
            (a.D.AsUInt32() - b.D.AsUInt32()).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 ShiftLeft(Lanes128 a, int count) =>
        new(
            (a.A.AsUInt32() << count).AsSingle(),
            (a.B.AsUInt32() << count).AsSingle(),
            (a.C.AsUInt32() << count).AsSingle(),
            (a.D.AsUInt32() << count).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 ShiftRight(Lanes128 a, int count) =>
        new(
            (a.A.AsUInt32() >>> count).AsSingle(),
            (a.B.AsUInt32() >>> count).AsSingle(),
            (a.C.AsUInt32() >>> count).AsSingle(),
            (a.D.AsUInt32() >>> count).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 ToSingle(Lanes128 a) =>
        new(
            Vector128.ConvertToSingle(a.A.AsInt32()),
            Vector128.ConvertToSingle(a.B.AsInt32()),
            Vector128.ConvertToSingle(a.C.AsInt32()),
            Vector128.ConvertToSingle(a.D.AsInt32()));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 Scale(Lanes128 a, Lanes128 n) => VectorMath.ScaleInTwo(a, n);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 MultiplyHigh(Lanes128 a, Lanes128 b) =>
        new(
            UpperHalves(a.A.AsUInt32(), b.A.AsUInt32()).AsSingle(),
            UpperHalves(a.B.AsUInt32(), b.B.AsUInt32()).AsSingle(),
            UpperHalves(a.C.AsUInt32(), b.C.AsUInt32()).AsSingle(),
            UpperHalves(a.D.AsUInt32(), b.D.AsUInt32()).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 MultiplyLow(Lanes128 a, Lanes128 b) =>
        new(
            (a.A.AsUInt32() * b.A.AsUInt32()).AsSingle(),
            (a.B.AsUInt32() * b.B.AsUInt32()).AsSingle(),
            (a.C.AsUInt32() * b.C.AsUInt32()).AsSingle(),
            (a.D.AsUInt32() * b.D.AsUInt32()).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Vector128<uint> UpperHalves(Vector128<uint> x, Vector128<uint> y)
    {
        if (!Sse2.IsSupported)
        {
            return Vector128.Create(
                (uint)(((ulong)x[0] * y[0]) >> 32),
                (uint)(((ulong)x[1] * y[1]) >> 32),
                (uint)(((ulong)x[2] * y[2]) >> 32),
                (uint)(((ulong)x[3] * y[3]) >> 32));
        }

        Vector128<ulong> even = Sse2.Multiply(x, y) >>> 32;
        Vector128<ulong> odd = Sse2.Multiply((x.AsUInt64() >>> 32).AsUInt32(), (y.AsUInt64() >>> 32).AsUInt32());
        return Vector128.ConditionalSelect(Vector128.Create(0xFFFFFFFFul), even, odd).AsUInt32();
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool Any(Lanes128 mask) => (mask.A | mask.B | mask.C | mask.D).AsUInt32().ExtractMostSignificantBits() != 0;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static float Sum(Lanes128 a) => Fold((a.A + a.C) + (a.B + a.D));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static float Largest(Lanes128 a) =>
        FoldLargest(Vector128.MaxNative(Vector128.MaxNative(a.A, a.C), Vector128.MaxNative(a.B, a.D)));

    /// <summary>Eight lanes to one: halves folded onto each other.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static float Fold(Vector256<float> v) => Fold(v.GetLower() + v.GetUpper());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static float Fold(Vector128<float> v) => (v[0] + v[2]) + (v[1] + v[3]);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static float FoldLargest(Vector256<float> v) => FoldLargest(Vector128.MaxNative(v.GetLower(), v.GetUpper()));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static float FoldLargest(Vector128<float> v)
    {
        v = Vector128.MaxNative(v, Vector128.Shuffle(v, Vector128.Create(2, 3, 0, 1)));
        v = Vector128.MaxNative(v, Vector128.Shuffle(v, Vector128.Create(1, 0, 3, 2)));
        return v[0];
    }
}

/// <summary>One lane, so that scalars go through the very same elementwise functions as vectors.</summary>
internal readonly unsafe struct Lane(float value) : ILanes<Lane>
{
    public readonly float V = value;

    private uint Bits => BitConverter.SingleToUInt32Bits(V);

    public static int Queries => 1;

    public static int Columns => 1;

    public static Lane Create(float value) => new(value);

    public static Lane CreateBits(uint value) => new(BitConverter.UInt32BitsToSingle(value));

    public static Lane Load(float* source) => new(*source);

    public static void Store(float* destination, Lane value) => *destination = value.V;

    public static Lane operator +(Lane a, Lane b) => new(a.V + b.V);

    public static Lane operator -(Lane a, Lane b) => new(a.V - b.V);

    public static Lane operator *(Lane a, Lane b) => new(a.V * b.V);

    public static Lane operator /(Lane a, Lane b) => new(a.V / b.V);

    public static Lane Fma(Lane a, Lane b, Lane c) => new(MathF.FusedMultiplyAdd(a.V, b.V, c.V));

    public static Lane Max(Lane a, Lane b) => a.V > b.V ? a : b;

    public static Lane Less(Lane a, Lane b) => CreateBits(a.V < b.V ? uint.MaxValue : 0);

    public static Lane GreaterOrEqual(Lane a, Lane b) => CreateBits(a.V >= b.V ? uint.MaxValue : 0);

    public static Lane Select(Lane mask, Lane a, Lane b) => mask.Bits != 0 ? a : b;

    public static Lane And(Lane a, Lane b) => CreateBits(a.Bits & b.Bits);

    public static Lane Or(Lane a, Lane b) => CreateBits(a.Bits | b.Bits);

    public static Lane Xor(Lane a, Lane b) => CreateBits(a.Bits ^ b.Bits);

    public static Lane Not(Lane a) => CreateBits(~a.Bits);

    public static Lane AddBits(Lane a, Lane b) => CreateBits(a.Bits + b.Bits);

    public static Lane SubtractBits(Lane a, Lane b) => CreateBits(a.Bits - b.Bits);

    public static Lane ShiftLeft(Lane a, int count) => CreateBits(a.Bits << count);

    public static Lane ShiftRight(Lane a, int count) => CreateBits(a.Bits >> count);

    public static Lane ToSingle(Lane a) => new((int)a.Bits);

    public static Lane Scale(Lane a, Lane n) => VectorMath.ScaleInTwo(a, n);

    public static Lane MultiplyHigh(Lane a, Lane b) => CreateBits((uint)(((ulong)a.Bits * b.Bits) >> 32));

    public static Lane MultiplyLow(Lane a, Lane b) => CreateBits(a.Bits * b.Bits);

    public static bool Any(Lane mask) => mask.Bits != 0;

    public static float Sum(Lane a) => a.V;

    public static float Largest(Lane a) => a.V;
}

/// <summary>Loads of a few elements, and the number of a row's lanes.</summary>
internal static unsafe class LaneMemory
{
    public const int Count = 16;

    /// <summary>The first <paramref name="count"/> of 16 lanes from memory, the others <paramref name="filler"/>.</summary>
    public static TLanes LoadPartial<TLanes>(float* source, int count, float filler)
        where TLanes : unmanaged, ILanes<TLanes>
    {
        float* lanes = stackalloc float[Count];
        for (int i = 0; i < Count; i++)
            lanes[i] = i < count ? source[i] : filler;
        return TLanes.Load(lanes);
    }

    public static void StorePartial<TLanes>(float* destination, TLanes value, int count)
        where TLanes : unmanaged, ILanes<TLanes>
    {
        float* lanes = stackalloc float[Count];
        TLanes.Store(lanes, value);
        for (int i = 0; i < count; i++)
            destination[i] = lanes[i];
    }
}
