namespace Rollout.Kernels;

/// <summary>
/// Sixteen fp32 lanes, whatever the machine's vector width: one 512-bit, two 256-bit or four 128-bit registers. A kernel written once over
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

/// <summary>One lane, so that scalars go through the same elementwise functions as vectors.</summary>
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
