using System.Collections;
using System.Globalization;

namespace Rollout.Engine;

/// <summary>
/// The problems of one input. A hostile or mistaken one may have millions: the first <see cref="Most"/> are kept, and the others counted.
/// </summary>
public sealed class ProblemList : IReadOnlyList<Problem>
{
    /// <summary>Most problems that are kept, besides one that says how many more there are.</summary>
    public const int Most = 20;

    private readonly List<Problem> _kept = [];
    private int _more;

    public ProblemList()
    {
    }

    /// <param name="problems">All are counted, the first are kept.</param>
    public ProblemList(IEnumerable<Problem> problems) => AddRange(problems);

    /// <summary>Whether further problems are only counted, so that there is no need to describe them.</summary>
    public bool IsFull => _kept.Count == Most;

    /// <summary>Of all problems, those that are only counted included.</summary>
    public int Found => _kept.Count + _more;

    public int Count => _kept.Count + (_more > 0 ? 1 : 0);

    public Problem this[int index] => index == Most && _more > 0 ? More : _kept[index];

    private Problem More => new("", string.Create(CultureInfo.InvariantCulture, $"and {_more} more"));

    public void Add(Problem problem)
    {
        if (IsFull) _more++;
        else _kept.Add(problem);
    }

    /// <summary>Counts a problem that need not be described, because the list is full.</summary>
    public void AddUndescribed() => _more++;

    public void AddRange(IEnumerable<Problem> problems)
    {
        if (problems is ProblemList list)
        {
            foreach (Problem problem in list._kept) Add(problem);
            _more += list._more;
            return;
        }

        foreach (Problem problem in problems) Add(problem);
    }

    /// <summary>The same problems under other names: see <see cref="Problem.Rename"/>.</summary>
    public ProblemList Rename(Func<string, string> field, Func<string, string> inMessage)
        => new(_kept.Select(problem => problem.Rename(field, inMessage))) { _more = _more };

    public IEnumerator<Problem> GetEnumerator()
    {
        foreach (Problem problem in _kept) yield return problem;
        if (_more > 0) yield return More;
    }

    public override string ToString() => string.Join("; ", this);

    IEnumerator IEnumerable.GetEnumerator() => GetEnumerator();
}
