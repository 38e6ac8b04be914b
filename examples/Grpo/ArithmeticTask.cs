using System.Globalization;
using System.Text;

namespace Rollout.Examples.Grpo;

/// <summary>One question and its right answer, as text.</summary>
public sealed record Problem(string Prompt, string Answer)
{
    /// <summary>The question as the policy reads it.</summary>
    public int[] Tokens { get; } = ArithmeticTask.Encode(Prompt);

    /// <summary>The right answer as the policy should write it, with the end token.</summary>
    public int[] AnswerTokens { get; } = [.. ArithmeticTask.Encode(Answer), ArithmeticTask.EndOfText];
}

/// <summary>
/// Additions of two two-digit numbers. The sum is written with its units first, as in addition by hand: the answer to "47+85=" is "231",
/// for 132. One pair in ten is held out: neither the warm start nor GRPO sees it, in either order.
/// </summary>
public sealed class ArithmeticTask
{
    /// <summary>One token for each byte, and one that ends a text.</summary>
    public const int EndOfText = 256;
    public const int VocabSize = 257;
    /// <summary>Three digits and the end token.</summary>
    public const int MaxAnswerTokens = 4;

    private readonly Random _random;
    private readonly Problem[] _training;
    private readonly Problem[] _heldOut;

    public ArithmeticTask(int seed)
    {
        _random = new Random(seed);
        // The split is the same for every seed, so that accuracies can be compared.
        Random split = new(17);
        List<Problem> training = [], heldOut = [];
        for (int a = 10; a < 100; a++)
        {
            for (int b = a; b < 100; b++)
            {
                List<Problem> list = split.Next(10) == 0 ? heldOut : training;
                list.Add(Make(a, b));
                if (a != b)
                    list.Add(Make(b, a));
            }
        }

        _training = [.. training];
        _heldOut = [.. heldOut];
        split.Shuffle(_heldOut);
    }

    /// <summary>The problems that are never trained on, shuffled.</summary>
    public IReadOnlyList<Problem> HeldOut => _heldOut;

    public IReadOnlyList<Problem> Training => _training;

    public Problem[] NextTraining(int count) => _random.GetItems(_training, count);

    public static int[] Encode(string text) => [.. Encoding.UTF8.GetBytes(text).Select(b => (int)b)];

    /// <summary>1 for exactly the right answer followed by the end token, else 0.</summary>
    public static double Reward(Problem problem, IReadOnlyList<int> completion) =>
        completion.SequenceEqual(problem.AnswerTokens) ? 1 : 0;

    private static Problem Make(int a, int b)
    {
        string sum = (a + b).ToString(CultureInfo.InvariantCulture);
        return new(string.Create(CultureInfo.InvariantCulture, $"{a}+{b}="), new string([.. sum.Reverse()]));
    }
}
